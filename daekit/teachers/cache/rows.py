"""The rows of a cache and their keys: a row is known by its token ids and by which of its positions carry loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from daekit.errors import UserError
from daekit.models.teacher_view import as_teacher_sees, is_told_more
from daekit.protocol import IGNORE_INDEX, Batch

KEY_BYTES = 16


@dataclass(frozen=True)
class CacheRow:
    """One row of the data.

    Attributes:
        input_ids: int32 ``[tokens]``.
        offsets: int32, its loss positions, counted from its start; position t carries loss when t + 1 has a label.
    """

    input_ids: np.ndarray
    offsets: np.ndarray

    @cached_property
    def key(self) -> bytes:
        """16 bytes of SHA-256 over both; the same wherever the row lies in a batch."""
        digest = hashlib.sha256(len(self.input_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.input_ids, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.offsets, dtype="<i4").tobytes())
        return digest.digest()[:KEY_BYTES]

    def __str__(self) -> str:
        head = " ".join(map(str, self.input_ids[:8].tolist()))
        return f"{len(self.input_ids)} tokens ({head}...), {len(self.offsets)} with loss"


def rows_of_batch(batch: Batch) -> list[CacheRow]:
    """The R rows of a batch, padded or packed, in its order."""
    layout = batch.layout
    ids_BT = batch.inputs["input_ids"].cpu().numpy().astype(np.int32)
    offsets_N = layout.offset_N.cpu().numpy().astype(np.int32)
    bounds = layout.bounds_R1.tolist()
    places = zip(layout.sequence_R.tolist(), layout.start_R.tolist(), layout.length_R.tolist(), strict=True)
    return [
        CacheRow(ids_BT[sequence, start : start + length], offsets_N[bounds[row] : bounds[row + 1]])
        for row, (sequence, start, length) in enumerate(places)
    ]


def rows_of_examples(examples: Iterable[Any]) -> Iterator[CacheRow]:
    """The rows of a tokenised data set, as a trainer prepares it, or of Batches; each as its teacher sees it.

    Args:
        examples: CacheRows, Batches, or mappings with ``input_ids``, optional ``labels`` (-100: no loss; default: the ids)
            and, where rows are packed, ``seq_lengths``; and ``teacher_prompt_ids`` where the teacher is told more.

    Raises:
        UserError: something else, such as rows that are not tokenised yet.
    """
    for number, example in enumerate(examples):
        if isinstance(example, CacheRow):
            yield example
        elif isinstance(example, Batch):
            yield from rows_of_batch(example.for_teacher or example)
        elif isinstance(example, Mapping) and "input_ids" in example:
            yield from _rows_of_example(as_teacher_sees(example) if is_told_more(example) else example)
        else:
            has = f"the columns {', '.join(map(str, example))}" if isinstance(example, Mapping) else type(example).__name__
            raise UserError(
                f"example {number}: a cache is made of tokenised rows (input_ids, labels), and this has {has}. Give the "
                "data set of a trainer (trainer.train_dataset), or prepare it with daekit.trainers.prepared.prepared_rows."
            )


def _rows_of_example(example: Mapping[str, Any]) -> Iterator[CacheRow]:
    ids = np.asarray(example["input_ids"], dtype=np.int32)
    labels = np.asarray(example.get("labels", ids), dtype=np.int64)
    packed = example.get("seq_lengths")
    lengths = [len(ids)] if packed is None else [int(length) for length in packed]
    end = 0
    for length in lengths:
        start, end = end, end + length
        # the first token of a row is predicted by nothing, see daekit.data.collator
        yield CacheRow(ids[start:end], np.flatnonzero(labels[start + 1 : end] != IGNORE_INDEX).astype(np.int32))
