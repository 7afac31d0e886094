"""The loss of one micro-batch: summed inside the student's forward, divided once; and the balancing loss of its routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from daekit.errors import UserError
from daekit.losses import prediction_loss
from daekit.models.backbone import base_of, can_run, frozen_forward
from daekit.models.heads import output_head
from daekit.protocol import Batch, TeacherOutput
from daekit.recipe.objective import Objective
from daekit.trainers.features import Comparison


def divergence_metric(objective: Objective) -> str:
    """The name under which a divergence is logged: its own, and ``kl`` for the usual one."""
    return "kl" if objective.divergence == "forward_kl" else objective.divergence


def teacher_outputs(trainer: Any, batch: Batch) -> list[TeacherOutput]:
    """The teacher's outputs; UserError if there are none, for the loss would be 0 without a word."""
    if trainer.teacher is None:
        return []
    capture = None if trainer.features is None else trainer.features.spec
    outputs: list[TeacherOutput] = trainer.teacher.outputs(batch.for_teacher or batch, capture)
    if not outputs and batch.labels_N.numel():
        raise UserError(
            f"{type(trainer.teacher).__name__} has no output for a batch of {batch.labels_N.numel()} loss positions: its "
            "outputs must cover every loss position exactly once"
        )
    return outputs


def summed_losses(
    trainer: Any, outputs: Any, batch: Batch, teacher_outputs: list[TeacherOutput], comparison: Comparison | None
) -> dict[str, Tensor]:
    """Runs inside the student's forward, where autocast and the hooks of DDP and FSDP hold; ``outputs`` are its backbone's.

    Returns:
        ``loss``, the weighted sum over loss positions; the metrics ``[N]`` of each position; ``aux_loss`` if it is wanted.
    """
    head, hidden_NH = output_head(trainer.model, trainer.vocab_size), batch.at_loss_positions(outputs.last_hidden_state)
    objective = trainer.loss_objective
    weight_N = batch.row_share_N if objective.normalize == "rows" else None
    sums = prediction_loss(
        hidden_NH, head, batch.labels_N, teacher_outputs, objective, weight_N=weight_N, labelled_N=batch.labelled_N
    )
    out = {"loss": sums.loss, "ce": sums.ce_N, "mean_token_accuracy": sums.correct_N}
    if sums.divergence_N is not None:
        out[divergence_metric(objective)] = sums.divergence_N
    if comparison is not None:
        compared = comparison.losses()
        out |= compared | {"loss": out["loss"] + compared["loss"]}
    return out | balancing_loss(trainer, outputs, batch)


def counted(objective: Objective, batch: Batch) -> int:
    """What the loss is a mean over: the loss tokens of a batch, or its rows that have some."""
    return batch.row_N.unique().numel() if objective.normalize == "rows" else batch.labels_N.numel()


def divided(trainer: Any, out: Mapping[str, Tensor], batch: Batch, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The sum divided by the loss tokens of the global batch (in an evaluation: of the batch), and the balancing loss."""
    items = counted(trainer.loss_objective, batch) if num_items_in_batch is None else num_items_in_batch
    loss = out["loss"] / torch.as_tensor(items, device=out["loss"].device).clamp(min=1)
    if num_items_in_batch is not None:  # DDP averages over ranks what is to be summed
        loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    if "aux_loss" in out:  # in the loss it is a mean over micro-batches, as in TRL
        steps = 1 if num_items_in_batch is None else trainer.current_gradient_accumulation_steps
        value = trainer.accelerator.gather_for_metrics(out["aux_loss"].detach()).mean().item()
        trainer._metrics["train" if trainer.model.training else "eval"]["aux_loss"].append(value)
        loss = loss + trainer.router_aux_loss_coef * out["aux_loss"] / steps
    return loss


# ---- the load-balancing loss of a mixture-of-experts student --------------------------------------------------------------


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
