"""The prediction loss: CE with the labels and a divergence from the teachers, over loss positions, in chunks.

Logits exist for one chunk of tokens at a time, in both models. The gradient with respect to the hidden states and the head
is computed in the forward pass, while the chunk's logits are there, so that nothing of size N x V outlives its chunk.
Memory beyond the inputs: N x H for the gradient of the hidden states, V x H for that of the head if it is trained (float32
where several chunks are summed), the heads in the compute dtype where they have another, and about ``2 x chunk x V`` floats of
work space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daekit.errors import UserError
from daekit.losses.chunk import Values, by_rows, chunk_losses, chunk_losses_on
from daekit.losses.divergences import divergence_of
from daekit.losses.top_k import bucket_log_probs, bucketed
from daekit.models.heads import common_columns, compute_dtype, in_dtype, project, teacher_logits
from daekit.models.sharded import whole_heads
from daekit.protocol import OutputHead, TeacherOutput
from daekit.recipe.objective import Objective

# Logits per chunk: 512 tokens of a vocabulary of 32,000, 64 MB in float32. Seconds on 2 cores for 2048 tokens of width 1024
# (forward KL, frozen head), by tokens per chunk: 128 3.13, 256 2.85, 512 2.57, 1024 2.42: matrix products like long chunks.
_CHUNK_VALUES = 2**24
_FEWEST_TOKENS = 512  # also for larger vocabularies: at V=64,000 chunks of 256 tokens were slower than whole logits
# On a GPU 1,046 tokens of a vocabulary of 128,256: 0.8 GB of work space with a 16-bit student. Not measured: a kernel has one
# program per token, so that fewer would leave processors idle, and a head's gradient is summed once per chunk.
_CHUNK_VALUES_GPU = 2**27
_ROWS = 32  # matrix products like a chunk whose tokens are a multiple of this
_TILE_VALUES = 2**22  # values of the head's gradient that are computed at a time where they are summed in float32


@dataclass(frozen=True)
class PredictionSums:
    """``loss`` is a sum over the N loss positions and carries the gradient; the rest is detached, one value per position."""

    loss: Tensor  # ce_weight * sum(ce_N) + prediction_weight * sum(divergence_N), nats
    ce_N: Tensor  # cross-entropy with the label at temperature 1, nats
    divergence_N: Tensor | None  # T^2 * D, nats (tv: D, without unit); None without a teacher
    correct_N: Tensor  # whether the label is the student's most likely token


def prediction_loss(
    hidden_NH: Tensor,
    head: OutputHead,
    labels_N: Tensor,
    teacher_outputs: Sequence[TeacherOutput],
    objective: Objective,
    chunk_tokens: int | None = None,
    *,
    weight_N: Tensor | None = None,
    labelled_N: Tensor | None = None,
) -> PredictionSums:
    """The sum of CE and divergence over the loss positions, with gradients for ``hidden_NH`` and a trainable head.

    Where heads are sharded this is a collective call: all ranks must call it, with outputs of the same teachers (of M = 0
    positions where a teacher has none to cover).

    Args:
        hidden_NH: the student's hidden states at the loss positions; N may be 0 (the loss is then a differentiable 0).
        head: the student's output head.
        labels_N: the token that each position predicts.
        teacher_outputs: empty for cross-entropy alone, otherwise they cover every position exactly once.
        objective: weights, divergence and temperature.
        chunk_tokens: tokens per chunk; None: see ``tokens_per_chunk``.
        weight_N: How much each position counts in ``loss``; None: 1.
        labelled_N: Whether CE counts at each position, bool; None: everywhere.

    Raises:
        UserError: the outputs do not cover as many positions as there are (a teacher of the user's own, as a rule), or a
            sparse output is no distribution over this vocabulary at this temperature.
    """
    if teacher_outputs:
        _require_each_once([output.positions_M for output in teacher_outputs], labels_N.numel())
    head, teacher_outputs = common_columns(head, teacher_outputs)
    members = [member for output in teacher_outputs for member in output.members]
    with whole_heads([head, *(member.head for member in members)]) as (head, *theirs):
        whole = iter(theirs)
        teacher_outputs = [
            replace(output, members=tuple(replace(member, head=next(whole)) for member in output.members))
            for output in teacher_outputs
        ]
        step = chunk_tokens or tokens_per_chunk(head.vocab_size, hidden_NH.is_cuda)
        work = _Chunks(hidden_NH, head, labels_N, teacher_outputs, objective, step, weight_N, labelled_N)
        loss, ce_N, divergence_N, correct_N = _PredictionLoss.apply(
            hidden_NH, head.weight, head.bias, work, torch.is_grad_enabled()
        )
    return PredictionSums(loss, ce_N, divergence_N if teacher_outputs else None, correct_N)


def _require_each_once(covered: list[Tensor], positions: int) -> None:
    together = torch.cat(covered)
    expected = torch.arange(positions, device=together.device)
    if together.numel() != positions or not torch.equal(together.sort().values, expected):
        raise UserError(
            f"the teacher covers {together.numel()} positions of a batch that has {positions} loss positions: "
            "its outputs must cover every loss position exactly once"
        )


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, work: _Chunks, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work.run(grad_enabled and any(ctx.needs_input_grad))
        ctx.save_for_backward(*work.gradients())
        ctx.mark_non_differentiable(work.ce_N, work.divergence_N, work.correct_N)
        return work.total(), work.ce_N, work.divergence_N, work.correct_N

    @staticmethod
    @once_differentiable  # the gradients are constants to autograd: a second derivative would be silently wrong
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None)


class _Chunks:
    """One pass over the chunks: per-token values, and gradients where they are wanted."""

    def __init__(
        self,
        hidden_NH: Tensor,
        head: OutputHead,
        labels_N: Tensor,
        teacher_outputs: Sequence[TeacherOutput],
        objective: Objective,
        step: int,
        weight_N: Tensor | None,
        labelled_N: Tensor | None,
    ) -> None:
        self.hidden_NH, self.labels_N, self.teacher_outputs = hidden_NH.detach(), labels_N, teacher_outputs
        self.objective, self.step, self.trained_head = objective, step, head
        self.weight_N, self.labelled_N = weight_N, labelled_N
        self.parts = self._parts()
        self.dtype = compute_dtype(hidden_NH)
        self.exact = torch.promote_types(torch.float32, self.dtype)

    def run(self, wants_gradient: bool) -> None:
        """All chunks of all teacher outputs (of all positions where there is no teacher)."""
        hidden_NH, self.wants_gradient = self.hidden_NH, wants_gradient
        self.head = in_dtype(self.trained_head, self.dtype)
        # work space of all chunks: fresh memory for each costs more than a pass over it
        size = min(self.step, hidden_NH.shape[0]), self.head.vocab_size
        self.student_MV = hidden_NH.new_empty(size, dtype=self.dtype)
        dense = any(output.members for output in self.teacher_outputs)
        self.teacher_MV = hidden_NH.new_empty(size, dtype=self.exact) if dense else None
        self.ce_N = hidden_NH.new_zeros(hidden_NH.shape[0], dtype=self.exact)
        self.divergence_N = torch.zeros_like(self.ce_N)
        self.correct_N = torch.zeros_like(self.labels_N, dtype=torch.bool)
        self.grad_hidden = torch.zeros_like(hidden_NH) if wants_gradient else None
        self.grad_weight = self._accumulator(self.trained_head.weight)
        self.grad_bias = self._accumulator(self.trained_head.bias)
        for output, objective in self.parts:
            positions_M = None if output is None else output.positions_M
            count = hidden_NH.shape[0] if positions_M is None else positions_M.numel()
            values = self._values_of(output, objective)
            for start in range(0, count, self.step):
                rows = slice(start, min(start + self.step, count))
                self._chunk(rows if positions_M is None else positions_M[rows], rows, values)

    def _parts(self) -> list[tuple[TeacherOutput | None, Objective]]:
        """The teacher outputs and the objective at their positions; split where CE counts at some of the positions only."""
        outputs = self.teacher_outputs or (None,)
        if self.labelled_N is None or not self.objective.ce_weight:
            return [(output, self.objective) for output in outputs]
        without_ce = self.objective.model_copy(update={"ce_weight": 0.0})
        parts: list[tuple[TeacherOutput | None, Objective]] = []
        for output in self.teacher_outputs:
            labelled_M = self.labelled_N[output.positions_M]
            parts += [(output.at(labelled_M), self.objective), (output.at(~labelled_M), without_ce)]
        return parts

    def _accumulator(self, parameter: Tensor | None) -> Tensor | None:
        """Zeros for the gradient of a trained parameter: float32 where several chunks are summed, or the sum would round."""
        if parameter is None or not (self.wants_gradient and parameter.requires_grad):
            return None
        one_chunk = self.hidden_NH.shape[0] <= self.step and len(self.parts) <= 1
        return torch.zeros_like(parameter, dtype=parameter.dtype if one_chunk else self.exact)

    def _values_of(self, output: TeacherOutput | None, objective: Objective) -> Callable[[Tensor, Tensor, slice], Values]:
        """The losses of a chunk, given the student's linear outputs, the labels and the chunk's place in the output."""
        how = objective, self.head, self.wants_gradient
        dense = chunk_losses_on(self.hidden_NH.device, self.dtype)
        if output is None:
            return lambda student, labels, rows: dense(student, None, labels, *how)
        if output.top_k is not None:
            ids, divergence = output.top_k.ids_MK.long(), divergence_of(self.objective)
            buckets = bucket_log_probs(output, self.head.vocab_size, self.objective, self.exact)

            def sparse(student: Tensor, labels: Tensor, rows: slice) -> Values:
                ids_MK, buckets_MK = ids[rows], buckets[rows]

                def part(few: slice) -> Values:
                    def compare(log_probs: Tensor) -> tuple[Tensor, Tensor]:
                        return bucketed(divergence, log_probs, ids_MK[few], buckets_MK[few])

                    return chunk_losses(student[few], compare, labels[few], *how)

                return by_rows(student, part)

            return sparse
        members = tuple(replace(m, head=in_dtype(m.head, compute_dtype(m.hidden_MH))) for m in output.members)
        teacher, space = replace(output, members=members), self.teacher_MV
        assert space is not None

        def values(student: Tensor, labels: Tensor, rows: slice) -> Values:
            logits = teacher_logits(teacher, rows, self.objective.temperature, space[: labels.numel()])
            return dense(student, logits, labels, *how)

        return values

    def _chunk(self, at: Tensor | slice, rows: slice, values: Callable[[Tensor, Tensor, slice], Values]) -> None:
        hidden_MH = self.hidden_NH[at].to(self.dtype)
        student_MV = project(hidden_MH, self.head, self.student_MV[: len(hidden_MH)])
        self.ce_N[at], self.divergence_N[at], self.correct_N[at] = values(student_MV, self.labels_N[at], rows)
        if not self.wants_gradient:
            return
        grad_logits_MV = student_MV
        if self.weight_N is not None:
            grad_logits_MV *= self.weight_N[at, None]  # a float32 weight, which 16 bits would round by up to 0.4%
        with torch.autocast(grad_logits_MV.device.type, enabled=False):
            self.grad_hidden[at] = (grad_logits_MV @ self.head.weight).to(self.hidden_NH.dtype)  # type: ignore[index]
            if self.grad_weight is not None:
                self._add_to(self.grad_weight[: self.head.vocab_size], grad_logits_MV, hidden_MH)
        if self.grad_bias is not None:
            self.grad_bias[: self.head.vocab_size] += grad_logits_MV.sum(0, dtype=self.exact)

    def _add_to(self, grad_VH: Tensor, grad_logits_MV: Tensor, hidden_MH: Tensor) -> None:
        if grad_VH.dtype == self.dtype:
            grad_VH.addmm_(grad_logits_MV.T, hidden_MH)
            return
        step = max(1, _TILE_VALUES // hidden_MH.shape[1])  # a product of all V x H would be as large as the gradient
        for start in range(0, grad_VH.shape[0], step):
            tile = slice(start, start + step)
            grad_VH[tile] += grad_logits_MV[:, tile].T @ hidden_MH

    def total(self) -> Tensor:
        """The weighted sum over all positions, summed in float64."""
        ce_N = self.ce_N if self.labelled_N is None else self.ce_N * self.labelled_N
        sums = [values_N if self.weight_N is None else values_N * self.weight_N for values_N in (ce_N, self.divergence_N)]
        ce, divergence = (values_N.sum(dtype=torch.float64) for values_N in sums)
        return (self.objective.ce_weight * ce + self.objective.prediction_weight * divergence).to(self.exact)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for hidden states, head weight and head bias, each in the dtype of its input."""
        head = self.trained_head
        weight = None if self.grad_weight is None else self.grad_weight.to(head.weight.dtype)
        bias = None if self.grad_bias is None or head.bias is None else self.grad_bias.to(head.bias.dtype)
        return self.grad_hidden, weight, bias


def tokens_per_chunk(vocab_size: int, on_gpu: bool) -> int:
    """So many tokens that a chunk has about 17 million logits (on a GPU 134 million), at least 512."""
    tokens = max(_FEWEST_TOKENS, (_CHUNK_VALUES_GPU if on_gpu else _CHUNK_VALUES) // vocab_size)
    return tokens - tokens % _ROWS
