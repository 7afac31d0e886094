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

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses.chunk import chunk_losses_on
from daekit.losses.gradients import Computed, with_gradients
from daekit.losses.top_k import Buckets, bucket_log_probs
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
        work = _Chunks(hidden_NH.detach(), head, labels_N, teacher_outputs, objective, step, weight_N, labelled_N)
        loss, ce_N, divergence_N, correct_N = with_gradients(work.run, hidden_NH, head.weight, head.bias)
    return PredictionSums(loss, ce_N, divergence_N if teacher_outputs else None, correct_N)


def _require_each_once(covered: list[Tensor], positions: int) -> None:
    together = torch.cat(covered)
    expected = torch.arange(positions, device=together.device)
    if together.numel() != positions or not torch.equal(together.sort().values, expected):
        raise UserError(
            f"the teacher covers {together.numel()} positions of a batch that has {positions} loss positions: "
            "its outputs must cover every loss position exactly once"
        )


@dataclass
class _Chunks:
    """One pass over the chunks of all teacher outputs (of all positions where there is no teacher)."""

    hidden_NH: Tensor  # detached
    head: OutputHead
    labels_N: Tensor
    teacher_outputs: Sequence[TeacherOutput]
    objective: Objective
    step: int
    weight_N: Tensor | None
    labelled_N: Tensor | None

    def run(self, *wanted: bool) -> Computed:
        """The loss, the values of each token, and the gradients of hidden states, head weight and bias where any is wanted."""
        hidden_NH, dtype, parts = self.hidden_NH, compute_dtype(self.hidden_NH), self._parts()
        exact = torch.promote_types(torch.float32, dtype)
        head = in_dtype(self.head, dtype)
        # work space of all chunks: fresh memory for each costs more than a pass over it
        size = min(self.step, len(hidden_NH)), head.vocab_size
        student_space = hidden_NH.new_empty(size, dtype=dtype)
        dense = any(output.members for output in self.teacher_outputs)
        teacher_space = hidden_NH.new_empty(size, dtype=exact) if dense else None
        ce_N = hidden_NH.new_zeros(len(hidden_NH), dtype=exact)
        divergence_N, correct_N = torch.zeros_like(ce_N), torch.zeros_like(self.labels_N, dtype=torch.bool)
        one_chunk = len(hidden_NH) <= self.step and len(parts) <= 1
        sums = self._zeros(wanted, None if one_chunk else exact) if any(wanted) else None
        for output, objective in parts:
            teacher = self._teacher(output, exact, teacher_space)
            sparse = output is not None and output.top_k is not None
            losses = chunk_losses_on(hidden_NH.device, dtype, sparse)
            count = len(hidden_NH) if output is None else len(output.positions_M)
            for start in range(0, count, self.step):
                rows = slice(start, min(start + self.step, count))
                at = rows if output is None else output.positions_M[rows]
                hidden_MH, labels_M = hidden_NH[at].to(dtype), self.labels_N[at]
                student_MV = project(hidden_MH, head, student_space[: len(labels_M)])
                values = losses(student_MV, teacher(rows), labels_M, objective, head, sums is not None)
                ce_N[at], divergence_N[at], correct_N[at] = values
                if sums is not None:
                    self._add_gradients(sums, at, student_MV, hidden_MH, head.weight)
        return self._total(ce_N, divergence_N), [ce_N, divergence_N, correct_N], sums and self._in_dtypes(sums)

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

    def _teacher(
        self, output: TeacherOutput | None, exact: torch.dtype, space_MV: Tensor | None
    ) -> Callable[[slice], Tensor | Buckets | None]:
        """What a teacher says at some rows of its output."""
        if output is None:
            return lambda rows: None
        if output.top_k is not None:
            log_probs = bucket_log_probs(output, self.head.vocab_size, self.objective, exact)
            return Buckets(output.top_k.ids_MK.long(), log_probs).__getitem__
        assert space_MV is not None
        members = tuple(replace(m, head=in_dtype(m.head, compute_dtype(m.hidden_MH))) for m in output.members)
        teacher, temperature = replace(output, members=members), self.objective.temperature
        return lambda rows: teacher_logits(teacher, rows, temperature, space_MV[: rows.stop - rows.start])

    def _zeros(self, wanted: Sequence[bool], exact: torch.dtype | None) -> list[Tensor | None]:
        """For the gradients of hidden states and head; the head's in ``exact`` where chunks are summed, or that would round."""
        head = [
            torch.zeros_like(parameter, dtype=exact or parameter.dtype) if parameter is not None and is_wanted else None
            for parameter, is_wanted in zip((self.head.weight, self.head.bias), wanted[1:], strict=True)
        ]
        return [torch.zeros_like(self.hidden_NH), *head]

    def _add_gradients(
        self, sums: list[Tensor | None], at: Tensor | slice, grad_logits_MV: Tensor, hidden_MH: Tensor, weight_VH: Tensor
    ) -> None:
        grad_hidden, grad_weight, grad_bias = sums
        columns = len(weight_VH)
        if self.weight_N is not None:
            grad_logits_MV *= self.weight_N[at, None]  # a float32 weight, which 16 bits would round by up to 0.4%
        with torch.autocast(grad_logits_MV.device.type, enabled=False):
            grad_hidden[at] = (grad_logits_MV @ weight_VH).to(self.hidden_NH.dtype)  # type: ignore[index]
            if grad_weight is not None:
                _add_product(grad_weight[:columns], grad_logits_MV, hidden_MH)
        if grad_bias is not None:
            grad_bias[:columns] += grad_logits_MV.sum(0, dtype=torch.promote_types(torch.float32, grad_logits_MV.dtype))

    def _in_dtypes(self, sums: list[Tensor | None]) -> list[Tensor | None]:
        inputs = self.hidden_NH, self.head.weight, self.head.bias
        return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(sums, inputs, strict=True)]

    def _total(self, ce_N: Tensor, divergence_N: Tensor) -> Tensor:
        """The weighted sum over all positions, summed in float64."""
        if self.labelled_N is not None:
            ce_N = ce_N * self.labelled_N
        sums = [values_N if self.weight_N is None else values_N * self.weight_N for values_N in (ce_N, divergence_N)]
        ce, divergence = (values_N.sum(dtype=torch.float64) for values_N in sums)
        return (self.objective.ce_weight * ce + self.objective.prediction_weight * divergence).to(divergence_N.dtype)


def _add_product(grad_VH: Tensor, grad_logits_MV: Tensor, hidden_MH: Tensor) -> None:
    if grad_VH.dtype == hidden_MH.dtype:
        grad_VH.addmm_(grad_logits_MV.T, hidden_MH)
        return
    step = max(1, _TILE_VALUES // hidden_MH.shape[1])  # a product of all V x H would be as large as the gradient
    for start in range(0, grad_VH.shape[0], step):
        tile = slice(start, start + step)
        grad_VH[tile] += grad_logits_MV[:, tile].T @ hidden_MH


def tokens_per_chunk(vocab_size: int, on_gpu: bool) -> int:
    """So many tokens that a chunk has about 17 million logits (on a GPU 134 million), at least 512."""
    tokens = max(_FEWEST_TOKENS, (_CHUNK_VALUES_GPU if on_gpu else _CHUNK_VALUES) // vocab_size)
    return tokens - tokens % _ROWS
