"""95 % intervals by the percentile bootstrap over rows of the data.

The rows are what was sampled, so they are what is resampled: tokens of one row are not independent of each other. A
token mean is a ratio of sums (``sum of totals / sum of weights``), and so is each resample of it. Two models that were
measured on the same rows are compared on the same resamples (a paired bootstrap), because the difficulty of a row is
common to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daekit.report.contents import Row

SEED = 0  # of the resamples: equal for all models, so that differences are paired
_BLOCK = 4_000_000  # indices drawn at a time, 32 MB


@dataclass(frozen=True)
class RowValues:
    """A metric row by row: its value is ``sum(total_R) / sum(weight_R)``.

    Attributes:
        total_R: float64, such as the NLL of a row's tokens, or 1 for a match.
        weight_R: float64, such as the number of the row's tokens, or 1.
    """

    total_R: np.ndarray
    weight_R: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float]) -> RowValues:
        """One value per row, all of the same weight."""
        return cls(np.array(values, dtype=np.float64), np.ones(len(values)))

    @classmethod
    def pooled(cls, parts: Sequence[RowValues]) -> RowValues:
        """The rows of several parts, one after another."""
        return cls(np.concatenate([part.total_R for part in parts]), np.concatenate([part.weight_R for part in parts]))

    @property
    def mean(self) -> float:
        return float(self.total_R.sum() / self.weight_R.sum())

    def row(self, model: str, domain: str, metric: str, rounds: int) -> Row:
        """The row of a report, with a 95 % interval from ``rounds`` resamples."""
        return Row(model, domain, metric, self.mean, *interval(self, rounds, SEED), len(self.total_R))


def resampled_means(values: RowValues, rounds: int, seed: int) -> np.ndarray:
    """``[rounds]`` the metric on ``rounds`` resamples of the R rows, the same resamples for the same R, ``rounds`` and
    ``seed``."""
    size = len(values.total_R)
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // size)
    means = np.empty(rounds)
    for start in range(0, rounds, block):
        index = random.integers(size, size=(min(block, rounds - start), size))
        means[start : start + block] = values.total_R[index].sum(axis=1) / values.weight_R[index].sum(axis=1)
    return means


def interval(values: RowValues, rounds: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean. With one row, or rows that all agree, it has zero width."""
    return _percentiles(resampled_means(values, rounds, seed))


def paired_interval(ours: RowValues, theirs: RowValues, rounds: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of ``ours.mean - theirs.mean``, both measured on the same rows in the same order."""
    if len(ours.total_R) != len(theirs.total_R):
        raise ValueError(f"a paired interval needs the same rows: {len(ours.total_R)} against {len(theirs.total_R)}")
    with np.errstate(invalid="ignore"):
        difference = resampled_means(ours, rounds, seed) - resampled_means(theirs, rounds, seed)
    return _percentiles(difference)


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # a diverged model has infinite values, and then no finite interval
        low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)
