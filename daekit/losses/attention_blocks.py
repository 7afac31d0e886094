"""KL between attention rows, block of queries by block: the torch version, for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daekit.protocol import AttentionLayer

_BLOCK_VALUES = 2**20  # scores per block and model
_SHORTEST_BLOCK = 16  # queries: shorter ones make the matrix products slow


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
    for first_n, first_m, count, *places, length in pairs_R8.tolist():
        row = _Row(student, teacher, first_n, first_m, places, length)
        offsets = offset_N[first_n : first_n + count].cpu()
        grad_key = row.student_key.new_zeros(row.student_key.shape) if gradients else None
        size = max(_SHORTEST_BLOCK, _BLOCK_VALUES // (student.query_NAD.shape[1] * length))
        for start in range(0, count, size):
            queries = slice(start, min(start + size, count))
            at = slice(first_n + queries.start, first_n + queries.stop)
            block = row.block(queries, offsets[queries])
            if value_N is not None:
                value_N[at] = block.value()
            if gradients is not None and grad_key is not None:
                gradients[0][at] = block.to_grad_scores().grad_query()
                block.add_grad_key(grad_key)
        if gradients is not None:
            sequence, begin = places[:2]
            gradients[1][sequence, :, begin : begin + length] = grad_key  # type: ignore[assignment]


class _Row:
    """One row of both models."""

    def __init__(
        self, student: AttentionLayer, teacher: AttentionLayer, first_n: int, first_m: int, places: list[int], length: int
    ) -> None:
        exact = torch.promote_types(torch.float32, student.query_NAD.dtype)
        sequence_s, start_s, sequence_t, start_t = places
        self.student, self.teacher = student, teacher
        self.student_query, self.teacher_query = student.query_NAD[first_n:], teacher.query_NAD[first_m:]
        self.student_key = student.key_BGTD[sequence_s, :, start_s : start_s + length].to(exact)
        self.teacher_key = teacher.key_BGTD[sequence_t, :, start_t : start_t + length].to(exact)

    def block(self, queries: slice, offset_Q: Tensor) -> _Block:
        """All heads of some queries."""
        window = self.student.window
        keys = slice(0 if window is None else max(0, int(offset_Q[0]) - window + 1), int(offset_Q[-1]) + 1)
        query_s, query_t = self.student_query[queries], self.teacher_query[queries]
        score_s = _scores(query_s, self.student_key[:, keys], self.student.scaling)
        score_t = _scores(query_t, self.teacher_key[:, keys], self.teacher.scaling)
        difference = score_t - score_s  # of raw scores: finite also where a mask makes the weights 0
        log_z_s = _softmax_(score_s, _hidden(offset_Q, keys, window))
        log_z_t = _softmax_(score_t, _hidden(offset_Q, keys, self.teacher.window))
        return _Block(score_s, score_t, difference, log_z_s - log_z_t, query_s, self.student_key, keys, self.student.scaling)


@dataclass(frozen=True)
class _Block:
    """Attention weights of some queries in both models; ``weight_s`` becomes the derivative of the KL by the scores."""

    weight_s: Tensor
    weight_t: Tensor
    difference_AQK: Tensor
    log_ratio_AQ: Tensor
    query_QAD: Tensor
    key_GTD: Tensor
    keys: slice
    scaling: float

    def value(self) -> Tensor:
        """``[Q]`` KL, summed over heads: ``sum_k t_k (score_t - score_s)_k - log Z_t + log Z_s``."""
        return (self.difference_AQK.mul_(self.weight_t).sum(-1) + self.log_ratio_AQ).sum(0)

    def to_grad_scores(self) -> _Block:
        """``s - t``, the derivative by the scores, in place of the student's weights."""
        self.weight_s.sub_(self.weight_t)
        return self

    def grad_query(self) -> Tensor:
        """``[Q, A, D]``."""
        grad_GQD = (self._grad_scores_GQK() @ self.key_GTD[:, self.keys]).mul_(self.scaling)
        queries, heads, width = self.query_QAD.shape
        return grad_GQD.view(heads, queries, width).transpose(0, 1)

    def add_grad_key(self, grad_GTD: Tensor) -> None:
        """Add the gradient of the keys to that of the whole row."""
        query_GQD = _grouped(self.query_QAD, self.key_GTD)
        grad_GTD[:, self.keys].baddbmm_(self._grad_scores_GQK().transpose(1, 2), query_GQD, alpha=self.scaling)

    def _grad_scores_GQK(self) -> Tensor:
        return self.weight_s.view(self.key_GTD.shape[0], -1, self.weight_s.shape[-1])


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


def _scores(query_QAD: Tensor, key_GKD: Tensor, scaling: float) -> Tensor:
    """``[A, Q, K]``."""
    score = (_grouped(query_QAD, key_GKD) * scaling) @ key_GKD.transpose(1, 2)
    return score.view(query_QAD.shape[1], query_QAD.shape[0], key_GKD.shape[1])


def _grouped(query_QAD: Tensor, key_GTD: Tensor) -> Tensor:
    """``[G, A / G * Q, D]``: the queries that share a head of the keys, in the dtype of the keys."""
    queries, heads, width = query_QAD.shape
    return query_QAD.to(key_GTD.dtype).transpose(0, 1).reshape(key_GTD.shape[0], heads // key_GTD.shape[0] * queries, width)
