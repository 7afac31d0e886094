"""Does a cache hold what its teacher says? Some rows are computed again, and compared with what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from daekit.protocol import Teacher
from daekit.teachers.cache.asking import AskedTeacher
from daekit.teachers.cache.rows import CacheRow
from daekit.teachers.cache.store import CacheStore, RowValues, bytes_to_ids
from daekit.teachers.cache.values import CacheFormat, values_of

_ROWS = 32  # spread over all that are there


def check_cache(
    teacher: Teacher, directory: str | Path, rows: Iterable[CacheRow], device: torch.device | None = None
) -> list[str]:
    """What differs between a whole cache and its teacher, in words, one sentence for each tensor that is kept.

    Args:
        teacher: the teacher that it was made from, loaded.
        directory: the cache.
        rows: tokenised rows, of which up to 32 that are in the cache are asked again.
        device: where the teacher runs.

    Raises:
        UserError: no whole cache; a corrupt shard.
    """
    store = CacheStore(directory)
    there = list({row.key: row for row in rows if row.key in store.index}.values())
    chosen = [there[index] for index in np.unique(np.linspace(0, len(there) - 1, min(_ROWS, len(there)), dtype=int))]
    form, asked = CacheFormat.of(store.facts), AskedTeacher(teacher, device)
    worst: dict[str, _Difference] = {}
    for row in chosen:
        output, labels_N = asked.ask([row])
        (live,) = values_of(form, output, labels_N, [row])
        kept = store.row(row.key)
        for name, difference in _compared(live, kept).items():
            worst[name] = worst.get(name, _Difference()) + difference
    return [f"{name}: {each} ({len(chosen)} rows)" for name, each in worst.items()]


class _Difference:
    """Values that differ, of how many, and by how much at most."""

    def __init__(self, differ: int = 0, of: int = 0, most: float = 0.0, largest: float = 0.0) -> None:
        self.differ, self.of, self.most, self.largest = differ, of, most, largest

    def __add__(self, other: _Difference) -> _Difference:
        most, largest = max(self.most, other.most), max(self.largest, other.largest)
        return _Difference(self.differ + other.differ, self.of + other.of, most, largest)

    def __str__(self) -> str:
        if not self.differ:
            return f"all {self.of:,} values are equal to the bit"
        by = f", by {self.most:.3g} at most; the largest is {self.largest:.3g}" if self.largest else ""
        return f"{self.differ:,} of {self.of:,} values differ{by}"


def _compared(live: dict[str, Tensor], kept: RowValues) -> dict[str, _Difference]:
    if "entry_ids" in live:  # how many draws are other tokens
        where = kept.entries()
        before = _draws(kept.between("entry_ids", *where), kept.between("entry_counts", *where), kept.of("distinct"))
        now = _draws(live["entry_ids"], live["entry_counts"], live["distinct"])
        return {"draws": _Difference((now - before).total(), now.total())}
    same_ids = torch.ones(1, dtype=torch.bool)
    found = {}
    for name, ours in live.items():
        theirs = kept.of(name)
        if name == "ids":
            same_ids = (ours == theirs).all(-1)
            found[name] = _Difference(int((~same_ids).sum()), same_ids.numel())
            continue
        same = same_ids if name == "log_probs" else torch.ones_like(theirs, dtype=torch.bool)
        gap = (ours.double() - theirs.double()).masked_fill(~same | (ours == theirs), 0.0).abs()
        largest = float(theirs.double().abs().masked_fill(~same, 0.0).max())
        found[name] = _Difference(int((gap > 0).sum()), int(same.sum()), float(gap.max()), largest)
    return found


def _draws(entry_ids: Tensor, counts: Tensor, distinct: Tensor) -> Counter[tuple[int, int]]:
    """(position, token) -> how often it was drawn there."""
    positions = torch.repeat_interleave(torch.arange(len(distinct)), distinct.long()).tolist()
    return Counter(dict(zip(zip(positions, bytes_to_ids(entry_ids).tolist(), strict=True), counts.tolist(), strict=True)))
