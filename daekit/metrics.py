"""Sums and counts per (metric, domain): true token means, reduced once over all ranks when they are logged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class TokenMeans:
    """Accumulates per-token values under names such as ``kl/ecommerce`` until they are logged.

    Values are summed in float64, so that the mean over a logging window is the mean over its tokens, not a mean of means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values_N: Tensor, row_N: Tensor, domains: Sequence[str]) -> None:
        """Add one value per loss position to the means ``name`` and ``name/<domain>``.

        Args:
            name: Name of the metric.
            values_N: one value per loss position.
            row_N: the row of each position, an index into ``domains``.
            domains: the domain of each row.
        """
        rows = len(domains)
        pairs = torch.stack([values_N.double(), torch.ones_like(values_N, dtype=torch.float64)])
        by_row = torch.zeros(2, rows, dtype=torch.float64, device=values_N.device).index_add_(1, row_N, pairs)
        for domain in dict.fromkeys(domains):
            members = torch.tensor([d == domain for d in domains], device=values_N.device)
            total = by_row[:, members].sum(dim=1)
            for key in (name, f"{name}/{domain}"):
                before = self._sums.get(key)
                self._sums[key] = total if before is None else before.to(total.device) + total

    def pop(self) -> dict[str, tuple[float, int]]:
        """(mean, tokens) per key over all ranks, then start anew. A collective call: every rank must make it."""
        local = self.state()
        self._sums = {}
        gathered = [local]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [{}] * dist.get_world_size()
            dist.all_gather_object(gathered, local)
        total: dict[str, list[float]] = {}
        for sums in gathered:
            for key, (value, count) in sums.items():
                entry = total.setdefault(key, [0.0, 0.0])
                entry[0] += value
                entry[1] += count
        return {key: (value / count, int(count)) for key, (value, count) in sorted(total.items()) if count > 0}

    def state(self) -> dict[str, list[float]]:
        """JSON-able sums and counts of this rank."""
        return {key: pair.tolist() for key, pair in self._sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Continue from a ``state()``, exactly."""
        self._sums = {key: torch.tensor(pair, dtype=torch.float64) for key, pair in state.items()}
