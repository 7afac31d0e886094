"""Does a cache hold what its teacher says? Some rows are computed again, and compared with what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from daekit.protocol import Teacher
from daekit.teachers.cache.asking import AskedTeacher
from daekit.teachers.cache.rows import CacheRow
from daekit.teachers.cache.store import CacheStore
from daekit.teachers.cache.values import CacheFormat, bytes_to_ids, values_of

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
    found: dict[str, list[_Difference]] = {}
    for row in chosen:
        (live,) = values_of(form, *asked.ask([row]), [row])
        for name, difference in _compared(live, partial(store.values, [row.key])).items():
            found.setdefault(name, []).append(difference)
    return [f"{name}: {_in_words(each)} ({len(chosen)} rows)" for name, each in found.items()]


class _Difference(NamedTuple):
    """Values that differ, of how many, and by how much at most; the largest of them."""

    differ: int
    of: int
    most: float = 0.0
    largest: float = 0.0


def _in_words(found: Sequence[_Difference]) -> str:
    differ, of = sum(each.differ for each in found), sum(each.of for each in found)
    if not differ:
        return f"all {of:,} values are equal to the bit"
    most, largest = max(each.most for each in found), max(each.largest for each in found)
    by = f", by {most:.3g} at most; the largest is {largest:.3g}" if largest else ""
    return f"{differ:,} of {of:,} values differ{by}"


def _compared(live: dict[str, Tensor], kept: Callable[[str], Tensor]) -> dict[str, _Difference]:
    if "entry_ids" in live:  # how many draws are other tokens
        before, now = _draws(kept), _draws(live.__getitem__)
        return {"draws": _Difference((now - before).total(), now.total())}
    same_ids = torch.ones(1, dtype=torch.bool)
    found = {}
    for name, ours in live.items():
        theirs = kept(name)
        if name == "ids":
            same_ids = (ours == theirs).all(-1)
            found[name] = _Difference(int((~same_ids).sum()), same_ids.numel())
            continue
        same = same_ids if name == "log_probs" else torch.ones_like(theirs, dtype=torch.bool)
        gap = (ours.double() - theirs.double()).masked_fill(~same | (ours == theirs), 0.0).abs()
        largest = float(theirs.double().abs().masked_fill(~same, 0.0).max())
        found[name] = _Difference(int((gap > 0).sum()), int(same.sum()), float(gap.max()), largest)
    return found


def _draws(of: Callable[[str], Tensor]) -> Counter[tuple[int, int]]:
    """(position, token) -> how often it was drawn there."""
    distinct, counts = of("distinct"), of("entry_counts")
    positions = torch.repeat_interleave(torch.arange(len(distinct)), distinct.long()).tolist()
    return Counter(dict(zip(zip(positions, bytes_to_ids(of("entry_ids")).tolist(), strict=True), counts.tolist(), strict=True)))
