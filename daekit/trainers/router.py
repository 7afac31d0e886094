"""The load-balancing loss of a mixture-of-experts student, and the settings of its config that TRL overwrites for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from daekit.errors import UserError
from daekit.models.backbone import base_of, can_run, frozen_forward
from daekit.protocol import Batch


@contextmanager
def keeping_router_settings(model: Any) -> Iterator[None]:
    """Give the config of a mixture-of-experts student its own router settings back, which TRL overwrites for training.

    A student saved with ``output_router_logits=True`` could not generate with a cache. The trainers give their settings to each
    forward.
    """
    config = model.config.get_text_config()
    before = {name: getattr(config, name) for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)}
    yield
    for name, value in before.items():
        setattr(config, name, value)


def router_inputs(trainer: Any) -> dict[str, bool]:
    """Whether the student's forward returns its router's logits, as an argument: its config has settings of its own."""
    known = hasattr(trainer.model.config.get_text_config(), "output_router_logits")
    return {"output_router_logits": trainer.aux_loss_enabled} if known else {}


def balancing_loss(trainer: Any, outputs: Any, batch: Batch) -> dict[str, Tensor]:
    """``aux_loss``, a mean over the tokens of the micro-batch; nothing where it is not wanted."""
    if not trainer.aux_loss_enabled:
        return {}
    config, mask = trainer.model.config.get_text_config(), batch.inputs.get("attention_mask")
    return {"aux_loss": load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask)}


def require_balancing_loss(trainer: Any) -> None:
    """Compute the loss on a few tokens, so that a family without it says so before the first step.

    Raises:
        UserError: a student that hands out no logits of its routers, or routes in another way (DeepSeek-V3: by a bias).
    """
    if not trainer.aux_loss_enabled or not can_run(trainer.model):
        return
    base = base_of(trainer.model)
    ids_1T = torch.arange(8, device=base.device)[None]
    batch = Batch({"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}, ids_1T, torch.zeros_like(ids_1T), ("",))
    try:
        with frozen_forward(trainer.model):
            trainer.model(**batch.inputs, **router_inputs(trainer), on_hidden=lambda out: balancing_loss(trainer, out, batch))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: {base.config.model_type} has no load-balancing loss over "
            f"the logits of its routers ({error}). Set it to 0."
        ) from error


def weighted(trainer: Any, aux_loss: Tensor, in_training: bool) -> Tensor:
    """The part of ``aux_loss`` in the loss, a mean over micro-batches as in TRL; it is logged on the way."""
    steps = trainer.current_gradient_accumulation_steps if in_training else 1
    value = trainer.accelerator.gather_for_metrics(aux_loss.detach()).mean().item()
    trainer._metrics["train" if trainer.model.training else "eval"]["aux_loss"].append(value)
    return trainer.router_aux_loss_coef * aux_loss / steps
