"""The loss of one micro-batch: summed inside the student's forward, divided once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import prediction_loss
from daekit.models.heads import output_head
from daekit.protocol import Batch, TeacherOutput
from daekit.recipe.objective import Objective
from daekit.trainers.features import Comparison
from daekit.trainers.router import balancing_loss, weighted


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
    if "aux_loss" in out:
        loss = loss + weighted(trainer, out["aux_loss"], num_items_in_batch is not None)
    return loss
