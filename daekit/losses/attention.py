"""The attention loss: KL between the rows of the teacher's and the student's attention, without their maps.

``sum over heads of KL(softmax(scaling_t q_t K_t) || softmax(scaling_s q_s K_s))`` for each query at a loss position, from
the queries and keys of both models ("A Teacher Is Worth A Million Instructions", arXiv 2406.19112, whose authors keep the
maps). The scores exist for one block of queries at a time; memory grows with T, not T^2. Gradients reach the student's queries
and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses.attention_blocks import attention_kl_
from daekit.losses.gradients import Computed, with_gradients
from daekit.models.features import require_equal_heads
from daekit.protocol import AttentionLayer, RowLayout

PairedTeacher = tuple[AttentionLayer, Tensor]  # and the pairs_R8 of its rows, see row_pairs


class Pass(Enum):
    """What one forward of the loss computes.

    Under gradient checkpointing a layer runs twice, and each half of the work is done once.
    """

    BOTH = "value and gradient"
    VALUE = "value only: no gradient is wanted, or the layer will be run again for it"
    GRADIENT = "gradient only: the value is known from the first run"


def row_pairs(student: RowLayout, teacher: RowLayout, positions_M: Tensor) -> Tensor:
    """``[R, 8]`` int64: which row of the teacher's batch is which of the student's; rows without loss positions are left out.

    Columns: the row's first query among the student's N and among the teacher's M, its number of queries, the
    sequence and the start of the row in the student's batch and in the teacher's, its length in tokens.

    Raises:
        UserError: the rows differ in length or in their loss positions.
    """
    count_R = teacher.bounds_R1.diff()
    theirs = count_R.nonzero().flatten()
    first_m = teacher.bounds_R1[theirs]
    first_n = positions_M[first_m]
    ours = torch.searchsorted(student.bounds_R1, first_n, right=True) - 1
    same = torch.equal(student.offset_N[positions_M], teacher.offset_N)
    if not same or not torch.equal(student.length_R[ours], teacher.length_R[theirs]):
        raise UserError("the teacher's rows are not the student's: attention can be compared only over the same tokens")
    columns = [first_n, first_m, count_R[theirs], student.sequence_R[ours], student.start_R[ours]]
    columns += [teacher.sequence_R[theirs], teacher.start_R[theirs], teacher.length_R[theirs]]
    return torch.stack(columns, dim=1)


def attention_loss(
    student: AttentionLayer, teachers: Sequence[PairedTeacher], offset_N: Tensor, run: Pass = Pass.BOTH
) -> tuple[Tensor, Tensor]:
    """The attention loss of one layer of the student.

    Memory beyond the inputs: the gradients of queries and keys, and a block of scores of a few million values.

    Args:
        student: The student's queries at the loss positions, and its keys.
        teachers: The teachers' layers and the rows that each covers; together they cover every loss position once.
        offset_N: Each loss position, counted from the start of its row.
        run: The part of the work to do.

    Returns:
        The sum over loss positions and heads, in nats, which carries the gradient; and ``[N]`` the sums over heads, detached.

    Raises:
        UserError: other numbers of heads; a window of the student that hides keys which the teacher looks at (KL infinite).
    """
    for teacher, pairs_R8 in teachers:
        require_equal_heads(student.query_NAD.shape[1], teacher.query_NAD.shape[1])
        _require_wide_window(student, teacher, pairs_R8)

    def compute(*wanted: bool) -> Computed:
        query_NAD, key_BGTD = student.query_NAD, student.key_BGTD
        exact = torch.promote_types(torch.float32, query_NAD.dtype)
        value_N = query_NAD.new_zeros(query_NAD.shape[0], dtype=exact)
        backwards = any(wanted) and run is not Pass.VALUE
        gradients = (torch.zeros_like(query_NAD), torch.zeros_like(key_BGTD)) if backwards else None
        wanted_value = None if backwards and run is Pass.GRADIENT else value_N
        with torch.autocast(query_NAD.device.type, enabled=False):
            for teacher, pairs_R8 in teachers:
                _kl_on(query_NAD)(student, teacher, pairs_R8, offset_N, wanted_value, gradients)
        return value_N.sum(dtype=torch.float64).to(exact), [value_N], gradients

    loss, value_N = with_gradients(compute, student.query_NAD, student.key_BGTD)
    return loss, value_N


def relation_heads(layer: AttentionLayer, heads: int) -> AttentionLayer:
    """The queries and keys of all heads side by side, split anew into ``heads`` (MiniLMv2, arXiv 2012.15828).

    Makes models with different numbers of heads comparable: the scores are those of relation heads of width A x D / heads, not
    of the model's own heads. Keys of grouped queries are repeated, so that queries and keys are equally wide.

    Raises:
        UserError: A x D is not a multiple of ``heads``.
    """
    positions, count, width = layer.query_NAD.shape
    batch, groups, length, _ = layer.key_BGTD.shape
    if count * width % heads:
        raise UserError(f"attention_relation_heads={heads}: {count} heads of width {width} cannot be split into so many")
    relation = count * width // heads
    repeated = layer.key_BGTD.repeat_interleave(count // groups, dim=1)
    return AttentionLayer(
        layer.query_NAD.reshape(positions, heads, relation),
        repeated.transpose(1, 2).reshape(batch, length, heads, relation).transpose(1, 2),
        relation**-0.5,
        layer.window,
    )


def _require_wide_window(student: AttentionLayer, teacher: AttentionLayer, pairs_R8: Tensor) -> None:
    """Where the student cannot look but its teacher does, the KL is infinite."""
    if student.window is None or (teacher.window is not None and teacher.window <= student.window) or not len(pairs_R8):
        return
    longest = int(pairs_R8[:, 7].max())
    if longest > student.window:
        raise UserError(
            f"the student's attention window of {student.window} tokens hides keys that its teacher looks at (window "
            f"{teacher.window}, rows of up to {longest} tokens): the KL is infinite. Set the student's sliding_window to at "
            "least the teacher's (null: none), or max_length to the student's window."
        )


def _kl_on(query_NAD: Tensor) -> Callable[..., None]:
    """``attention_kl_`` for a device: Triton kernels on CUDA (but for float64), blocks of torch elsewhere; the same result."""
    if not query_NAD.is_cuda or query_NAD.dtype == torch.float64:
        return attention_kl_
    from daekit.losses.kernels import attention as kernels  # needs triton

    return kernels.attention_kl_
