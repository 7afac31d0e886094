"""The load-balancing loss of a mixture-of-experts student, and the settings of its config that TRL overwrites for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from daekit.errors import UserError
from daekit.models.backbone import base_of, can_run, frozen_forward
from daekit.protocol import Batch


@dataclass(frozen=True)
class RouterSettings:
    """The router's settings in the config of a mixture-of-experts student, which TRL overwrites for training.

    A student saved with ``output_router_logits=True`` could not generate with a cache. The trainers give their settings
    to each forward, so the config gets its own back as soon as TRL has read it.
    """

    values: dict[str, Any]

    @classmethod
    def of(cls, model: Any) -> RouterSettings:
        """The settings as they are now."""
        config = model.config.get_text_config()
        names = ("output_router_logits", "router_aux_loss_coef")
        return cls({name: getattr(config, name) for name in names if hasattr(config, name)})

    def restore(self, model: Any) -> None:
        """Set them again, in the config of the same student."""
        for name, value in self.values.items():
            setattr(model.config.get_text_config(), name, value)


def router_inputs(trainer: Any) -> dict[str, bool]:
    """Whether the student's forward returns its router's logits, as an argument: its config has settings of its own."""
    known = hasattr(trainer.model.config.get_text_config(), "output_router_logits")
    return {"output_router_logits": trainer.aux_loss_enabled} if known else {}


def balancing_loss(trainer: Any, outputs: Any, batch: Batch) -> dict[str, Tensor]:
    """``aux_loss``, a mean over the tokens of the micro-batch; nothing where it is not wanted."""
    if not trainer.aux_loss_enabled:
        return {}
    config, mask = trainer.model.config.get_text_config(), batch.inputs.get("attention_mask")
    loss = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask)
    return {"aux_loss": loss}


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
