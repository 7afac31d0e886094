"""Teachers and rows of the tests of caches, and outputs compared to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from daekit.protocol import Batch, Teacher
from daekit.teachers import ModelTeacher
from daekit.teachers.cache.asking import padded_batch
from daekit.teachers.cache.rows import rows_of_examples
from tests.helpers import tiny
from tests.helpers.batches import Row, make_rows

V = len(tiny.WORDS)


def model_teacher(seed: int = 2, hidden: int = 48, **fields: Any) -> ModelTeacher:
    return ModelTeacher(tiny.model(seed=seed, hidden=hidden, **fields), V)


def long_rows(count: int = 12, seed: int = 5, longest: int = 60) -> list[Row]:
    return make_rows(seed, count, longest)


def batch_to(rows: list[Row], length: int = 64) -> Batch:
    """As a training with ``pad_to_multiple_of`` collates rows."""
    cached = list(rows_of_examples(rows))
    return padded_batch(cached, length, torch.device("cpu"))


def hidden_of(teacher: Teacher, batch: Batch) -> list[torch.Tensor]:
    (output,) = teacher.outputs(batch)
    return [member.hidden_MH for member in output.members]


def bytes_of(directory: Path) -> dict[str, str]:
    """File -> hash, of all that makes a cache."""
    files = [path for path in directory.iterdir() if not path.name.endswith(".lock")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
