"""KL between attention rows, block of queries by block: in torch, on CPUs and for float64."""

from __future__ import annotations

import torch
from torch import Tensor

from daekit.protocol import AttentionLayer

BLOCK_VALUES = 2**20  # scores per block and model
SHORTEST_BLOCK = 32  # queries: each block goes over all keys before it. 8,192 tokens, 8 heads: 16 3.48 s, 32 3.09, 64 3.03


def attention_kl_(
    student: AttentionLayer,
    teacher: AttentionLayer,
    pairs_R8: Tensor,
    offset_N: Tensor,
    value_N: Tensor | None,
    gradients: tuple[Tensor, Tensor] | None,
) -> None:
    """Write KL(teacher || student), summed over heads, and its gradient for the rows of ``pairs_R8``.

    Args:
        student: queries ``[N, A, D]`` at the student's loss positions, keys ``[B, G, T, D]``.
        teacher: Queries and keys of the teacher; A must be equal, all else may differ.
        pairs_R8: The rows of both that belong together, see ``daekit.losses.attention.row_pairs``.
        offset_N: each loss position of the student, counted from the start of its row; ascending within a row.
        value_N: written at the loss positions of these rows; None: gradients only.
        gradients: buffers for the gradient of the sum of values, shaped like the student's queries and keys, written at the
            loss positions and at the keys of these rows; None: values only.
    """
    exact = torch.promote_types(torch.float32, student.query_NAD.dtype)
    for first_n, first_m, count, sequence_s, start_s, sequence_t, start_t, length in pairs_R8.tolist():
        of_student = _Row(student, first_n, student.key_BGTD[sequence_s, :, start_s : start_s + length].to(exact))
        of_teacher = _Row(teacher, first_m, teacher.key_BGTD[sequence_t, :, start_t : start_t + length].to(exact))
        offsets, grad_key = offset_N[first_n : first_n + count].cpu(), torch.zeros_like(of_student.key_GTD)
        size = max(SHORTEST_BLOCK, BLOCK_VALUES // (student.query_NAD.shape[1] * length))
        for start in range(0, count, size):
            queries = slice(start, min(start + size, count))
            offset_Q, at = offsets[queries], slice(first_n + queries.start, first_n + queries.stop)
            begin = 0 if student.window is None else max(0, int(offset_Q[0]) - student.window + 1)
            keys = slice(begin, int(offset_Q[-1]) + 1)  # those that the queries reach back to
            weight_s, weight_t = of_student.scores(queries, keys), of_teacher.scores(queries, keys)
            difference_AQK = weight_t - weight_s  # of scores before masks, so that they are finite where a weight is 0
            log_z_s = _softmax_(weight_s, _hidden(offset_Q, keys, student.window))
            log_ratio_AQ = log_z_s - _softmax_(weight_t, _hidden(offset_Q, keys, teacher.window))
            if value_N is not None:  # sum_k t_k (score_t - score_s)_k - log Z_t + log Z_s, summed over heads
                value_N[at] = (difference_AQK.mul_(weight_t).sum(-1) + log_ratio_AQ).sum(0)
            if gradients is not None:
                gradients[0][at] = of_student.backward(weight_s.sub_(weight_t), queries, keys, grad_key)
        if gradients is not None:
            gradients[1][sequence_s, :, start_s : start_s + length] = grad_key


class _Row:
    """One row of one model: its queries at loss positions, from ``first`` on, and its keys."""

    def __init__(self, layer: AttentionLayer, first: int, key_GTD: Tensor) -> None:
        self.query_QAD, self.key_GTD, self.scaling = layer.query_NAD[first:], key_GTD, layer.scaling

    def scores(self, queries: slice, keys: slice) -> Tensor:
        """``[A, Q, K]``, before masks."""
        query_QAD, key_GKD = self.query_QAD[queries], self.key_GTD[:, keys]
        score = (_grouped(query_QAD, key_GKD) * self.scaling) @ key_GKD.transpose(1, 2)
        return score.view(query_QAD.shape[1], query_QAD.shape[0], key_GKD.shape[1])

    def backward(self, grad_AQK: Tensor, queries: slice, keys: slice, grad_key_GTD: Tensor) -> Tensor:
        """``[Q, A, D]`` gradient of queries, from that of their scores; that of the keys is added to the row's."""
        query_QAD, key_GTD = self.query_QAD[queries], self.key_GTD
        grad_GQK = grad_AQK.view(key_GTD.shape[0], -1, grad_AQK.shape[-1])
        grad_key_GTD[:, keys].baddbmm_(grad_GQK.transpose(1, 2), _grouped(query_QAD, key_GTD), alpha=self.scaling)
        grad_GQD = (grad_GQK @ key_GTD[:, keys]).mul_(self.scaling)
        count, heads, width = query_QAD.shape
        return grad_GQD.view(heads, count, width).transpose(0, 1)


def _softmax_(score_AQK: Tensor, hidden: list[tuple[slice, Tensor]]) -> Tensor:
    """Turn scores into attention weights in place; returns ``[A, Q]`` the logarithms of their normalisers."""
    for columns, mask_QK in hidden:
        score_AQK[..., columns].masked_fill_(mask_QK.to(score_AQK.device), float("-inf"))
    largest = score_AQK.amax(-1)
    torch.softmax(score_AQK, dim=-1, out=score_AQK)
    return largest - score_AQK.amax(-1).log()  # of the likeliest key: x - log Z = log p


def _hidden(offset_Q: Tensor, keys: slice, window: int | None) -> list[tuple[slice, Tensor]]:
    """The columns of a block that hold hidden keys, and which are hidden: the future of some queries, or behind a window."""
    first, last = int(offset_Q[0]), int(offset_Q[-1])
    future = torch.arange(first, last + 1)
    parts = [(slice(first - keys.start, None), future > offset_Q[:, None])]
    if window is not None and last - window >= keys.start:
        past = torch.arange(keys.start, last - window + 1)
        parts.append((slice(0, len(past)), past <= offset_Q[:, None] - window))
    return parts


def _grouped(query_QAD: Tensor, key_GTD: Tensor) -> Tensor:
    """``[G, A / G * Q, D]``: the queries that share a head of the keys, in the dtype of the keys."""
    queries, heads, width = query_QAD.shape
    return query_QAD.to(key_GTD.dtype).transpose(0, 1).reshape(key_GTD.shape[0], heads // key_GTD.shape[0] * queries, width)
