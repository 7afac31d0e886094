"""A teacher that is asked about rows alone, each batch padded so that what it says of a row does not depend on the others."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.models.backbone import base_of
from daekit.protocol import IGNORE_INDEX, Batch, Teacher, TeacherOutput
from daekit.teachers.adapter import OnStudent
from daekit.teachers.cache.rows import CacheRow
from daekit.teachers.parts import leaves

PAD_TO = 64  # tokens; with other lengths a CPU's attention adds up the last columns in another order (see docs/caches.md)


class AskedTeacher:
    """A teacher whose outputs are to be kept.

    Args:
        teacher: a model, adapter or ensemble.
        device: where it runs; None: it stays where it is, and is given batches on the CPU.

    Attributes:
        identity: its identity, taken before it is moved.
    """

    def __init__(self, teacher: Teacher, device: torch.device | None) -> None:
        self.teacher, self.device = teacher, device or torch.device("cpu")
        self.identity = teacher.identity()
        if device is not None:
            teacher.to(device)
        self._longest = _longest(teacher)

    def padded(self, row: CacheRow) -> int:
        """Tokens that a row takes in a batch of its like."""
        length = len(row.input_ids)
        return max(length, min(math.ceil(length / PAD_TO) * PAD_TO, self._longest))

    def ask(self, rows: Sequence[CacheRow]) -> tuple[TeacherOutput, Tensor]:
        """The teacher's output for rows, in the order of their loss positions, and the tokens that these predict.

        Raises:
            UserError: several outputs, or another order.
        """
        batch = padded_batch(rows, max(map(self.padded, rows)), self.device)
        with torch.no_grad():
            outputs = self.teacher.outputs(batch)
        order = torch.arange(batch.labels_N.numel())
        if len(outputs) != 1 or not torch.equal(outputs[0].positions_M.cpu(), order):
            raise UserError(
                f"{type(self.teacher).__name__}: gives several outputs for rows of one domain, or not in the order of their "
                "loss positions; only one in that order can be kept"
            )
        return outputs[0], batch.labels_N


def require_one_teacher(teacher: Teacher) -> None:
    """Refuse teachers that are not asked about rows alone; UserError."""
    for part, domains in leaves(teacher).items():
        if domains is not None:
            raise UserError(
                "a routed teacher says other things about a row for another domain, and a cache knows rows by their tokens "
                "alone. Write a cache of each of its teachers, and route those: RoutedTeacher({domain: CachedTeacher(...)})."
            )
        if isinstance(part, OnStudent):
            raise UserError(f"{part}: is not a loaded teacher; give an AdapterTeacher or a ModelTeacher")


def padded_batch(rows: Sequence[CacheRow], length: int, device: torch.device) -> Batch:
    """Rows padded on the right to ``length`` tokens; their labels are their own tokens, at the loss positions."""
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    row_BT = torch.full_like(ids_BT, -1)
    for index, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids).long()
        predicted = torch.from_numpy(row.offsets).long() + 1
        ids_BT[index, : len(ids)] = ids
        labels_BT[index, predicted] = ids[predicted]
        row_BT[index, : len(ids)] = index
    inputs = {"input_ids": ids_BT, "attention_mask": (row_BT >= 0).long()}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return Batch(inputs, labels_BT.to(device), row_BT.to(device), ("",) * len(rows))


def autocast_dtype(device: torch.device) -> str:
    """The dtype of autocast on a device, ``none`` where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return "none"
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def head_tensors(output: TeacherOutput) -> dict[str, Tensor]:
    """The output heads of an output's members, as they are kept."""
    tensors = {}
    for index, member in enumerate(output.members):
        columns = slice(0, member.head.vocab_size)
        tensors[f"weight.{index}"] = member.head.weight[columns].detach().cpu().clone()
        if member.head.bias is not None:
            tensors[f"bias.{index}"] = member.head.bias[columns].detach().cpu().clone()
    return tensors


def _longest(teacher: Teacher) -> int:
    """The most positions that the models of a teacher have."""
    models = [each.model for each in leaves(teacher) if hasattr(each, "model") and hasattr(each.model, "config")]
    limits = [getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)
