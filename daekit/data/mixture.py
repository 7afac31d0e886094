"""What a stage trains on: rows of several sources in given shares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from datasets import Dataset, concatenate_datasets

from daekit.data.rows import take
from daekit.environment import host_memory
from daekit.errors import UserError
from daekit.recipe.schema import MixtureSpec

_COPIES, _INDEX = 2, 8  # of a row while it is mixed: as it was chosen, and in its place; bytes that say which it is


@dataclass(frozen=True)
class SourceUse:
    """How one source takes part in a mixture.

    Attributes:
        available: rows that it has.
        used: rows of the mixture that come from it, repetitions counted.
        share: its share of the mixture's rows.
        repeats: how often each of its rows is used on average: 1 is once, below 1 some are left out.
    """

    source: str
    domain: str
    available: int
    used: int
    share: float
    repeats: float


@dataclass(frozen=True)
class Mixture:
    """The rows in their (seeded) order, and how they came about."""

    dataset: Dataset
    table: list[SourceUse]


def mix(sources: Mapping[str, Dataset], spec: MixtureSpec, seed: int) -> Mixture:
    """Bring (tokenised) rows of ``spec.sources`` together in the shares that ``spec.weights`` says, shuffled by ``seed``.

    Weights are shares of *rows*, relative to their sum. Which rows of a source are left out or used once more than the others
    depends on the seed and the source's name only, not on the other sources.

    Raises:
        UserError: a source that gets no row; more rows than the memory holds.
    """
    parts = {name: sources[name] for name in spec.sources}
    available = [len(part) for part in parts.values()]
    used = list(available) if not spec.weights else rows_of_each(spec, available)
    require_memory(spec, used, [part.data.nbytes / max(part.data.num_rows, 1) for part in parts.values()])
    uses = [(name, part, count) for (name, part), count in zip(parts.items(), used, strict=True)]
    together = concatenate_datasets([take(part, _choose(len(part), count, seed, name)) for name, part, count in uses])
    table = [
        SourceUse(name, part[0]["domain"], len(part), count, count / sum(used), count / len(part)) for name, part, count in uses
    ]
    return Mixture(take(together, _generator(seed, "").permutation(len(together))), table)


def rows_of_each(spec: MixtureSpec, available: list[int]) -> list[int]:
    """Rows of each source of a weighted mixture: they sum to the total exactly, by largest remainder.

    Raises:
        UserError: a source that gets no row.
    """
    # Exact: 0.29 * 100 is not 29 in floating point, and the floor below would lose a row.
    weights = [Fraction(str(weight)) for weight in spec.weights]
    shares = [weight / sum(weights) for weight in weights]
    total = spec.rows or math.floor(min(n / share for n, share in zip(available, shares, strict=True)))
    exact = [share * total for share in shares]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for name, count, share in zip(spec.sources, counts, shares, strict=True):
        if count == 0:
            raise UserError(
                f"data.{name}: a share of {float(share):.4g} of {total} rows is not one row; raise its weight or data.rows"
            )
    return counts


def require_memory(spec: MixtureSpec, used: Sequence[int], sizes: Sequence[float]) -> None:
    """UserError for a number of rows whose copies do not fit into the memory; ``sizes``: bytes of a row of each source."""
    needed = sum(count * (_COPIES * size + _INDEX) for count, size in zip(used, sizes, strict=True))
    if spec.rows is not None and needed > (available := host_memory()):
        raise UserError(
            f"data.rows: {spec.rows:,} rows take {needed / 1e9:,.1f} GB while they are mixed, and {available / 1e9:,.1f} GB of "
            "memory are available; set fewer, and train for more epochs or steps: the rows of a source are only repeated"
        )


def _choose(available: int, count: int, seed: int, name: str) -> np.ndarray:
    """``count`` row indices: every row ``count // available`` times, and a seeded choice of the others once more."""
    passes, rest = divmod(count, available)
    extra = np.sort(_generator(seed, name).permutation(available)[:rest])
    return np.concatenate([np.tile(np.arange(available), passes), extra]).astype(np.int64)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])
