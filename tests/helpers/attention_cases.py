"""Queries and keys of two models, the attention loss on them, and the same by its twin in tests/reference.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daekit.losses.attention import attention_loss, row_pairs
from daekit.protocol import AttentionLayer, Batch
from tests import reference


@dataclass
class Side:
    """One model's sequences: queries ``[B, A, T, D]``, keys ``[B, G, T, D]``, and the row of each token."""

    query: Tensor
    key: Tensor
    batch: Batch
    scaling: float
    window: int | None = None

    def layer(self) -> AttentionLayer:
        return AttentionLayer(self.batch.at_loss_positions(self.query.transpose(1, 2)), self.key, self.scaling, self.window)

    def maps(self) -> list[Tensor]:
        """Attention of each sequence ``[A, T, T]``."""
        return [
            reference.attention_map(query, key, self.scaling, self.window, rows)
            for query, key, rows in zip(self.query, self.key, self.batch.row_BT.tolist(), strict=True)
        ]

    def to(self, dtype: torch.dtype) -> Side:
        return replace(self, query=self.query.detach().clone().to(dtype), key=self.key.detach().clone().to(dtype))


def batch_of(rows: list[list[int]], kept: set[tuple[int, int]]) -> Batch:
    """``kept``: (sequence, position) that predict something; a row may not predict across its end."""
    row_BT = torch.tensor(rows)
    labels = torch.full_like(row_BT, -100)
    for b, t in kept:
        if b < len(rows) and t + 1 < row_BT.shape[1] and row_BT[b, t] == row_BT[b, t + 1] >= 0:
            labels[b, t + 1] = 1
    return Batch({}, labels, row_BT, ("d",) * (int(row_BT.max()) + 1))


def make_side(batch: Batch, seed: int, heads: int = 4, groups: int = 2, width: int = 6, window: int | None = None) -> Side:
    generator = torch.Generator().manual_seed(seed)
    sequences, length = batch.row_BT.shape
    query = torch.randn(sequences, heads, length, width, generator=generator, dtype=torch.float64)
    key = torch.randn(sequences, groups, length, width, generator=generator, dtype=torch.float64)
    return Side(query, key, batch, scaling=0.9, window=window)


PADDED = [[0, 0, 0, 0, 0, 0, 0, -1, -1], [-1, -1, 1, 1, 1, 1, -1, -1, -1], [2] * 9]


PACKED = [[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, -1]]


EVERY = {(b, t) for b in range(3) for t in range(15)}


SOME = {(0, 1), (0, 2), (0, 5), (0, 7), (0, 9), (1, 4), (2, 0), (2, 7)}


def ours(
    student: Side, teacher: Side, dtype: torch.dtype = torch.float64, upstream: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = student.to(dtype), teacher.to(dtype)
    student.query.requires_grad_(), student.key.requires_grad_()
    pairs = row_pairs(student.batch.layout, teacher.batch.layout, torch.arange(len(student.batch.loss_index_N)))
    loss, value = attention_loss(student.layer(), [(teacher.layer(), pairs)], student.batch.layout.offset_N)
    (upstream * loss).backward()
    return loss.detach(), value, student.query.grad, student.key.grad


def twin(student: Side, teacher: Side, upstream: float = 1.0) -> tuple[Tensor, ...]:
    student = replace(student, query=student.query.clone().requires_grad_(), key=student.key.clone().requires_grad_())
    pairs = zip(teacher.maps(), student.maps(), strict=True)
    values = torch.stack([reference.attention_kl(theirs, mine) for theirs, mine in pairs])
    value = values.flatten()[student.batch.loss_index_N]
    (upstream * value.sum()).backward()
    return value.sum().detach(), value.detach(), student.query.grad, student.key.grad


def check(student: Side, teacher: Side, dtype: torch.dtype, tolerance: float, upstream: float = 1.0) -> None:
    for mine, theirs in zip(ours(student, teacher, dtype, upstream), twin(student, teacher, upstream), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-12), (mine, theirs)
