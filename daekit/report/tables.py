"""Arranges rows as tables; terminal, Markdown and HTML share the headline table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from daekit.report.contents import Report, Row
from daekit.report.metrics import HEADLINE, format_value, metric_title, most_of, split_comparison

_MANY_PARTS = 4  # parts of a domain (``blimp/wh_island``) beyond which they are shown apart


@dataclass(frozen=True)
class Column:
    """A metric on a domain."""

    domain: str
    metric: str

    @property
    def heading(self) -> str:
        """``general``, or ``general: forgetting``."""
        kind = split_comparison(self.metric)[1]
        return self.domain if kind is None else f"{self.domain}: {kind}"

    @property
    def title(self) -> str:
        """``exact match``, also for a gain or forgetting."""
        return metric_title(split_comparison(self.metric)[0])


@dataclass(frozen=True)
class Pivot:
    """Models x (domain, metric); a cell is None where nothing was measured.

    Attributes:
        best: columns -> the models with the best value (several when equal, none when only one model was measured).
    """

    models: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: dict[tuple[str, Column], Row]
    best: dict[Column, frozenset[str]]

    @property
    def by_domain(self) -> dict[str, list[Column]]:
        """Domain -> its columns."""
        found: dict[str, list[Column]] = {}
        for column in self.columns:
            found.setdefault(column.domain, []).append(column)
        return found


def blocks(table: Pivot, most: int = 7) -> list[Pivot]:
    """The table in parts of at most ``most`` columns, so that a page need not be scrolled; a domain's columns stay together."""
    parts: list[list[Column]] = [[]]
    for columns in table.by_domain.values():
        if parts[-1] and len(parts[-1]) + len(columns) > most:
            parts.append([])
        parts[-1] += columns
    return [replace(table, columns=tuple(part)) for part in parts]


def pivot(rows: Sequence[Row], metrics: Iterable[str] = HEADLINE) -> Pivot:
    """Models down, domains and ``metrics`` across, each in the order of their first row; without the parts of domains that
    have many (see ``breakdowns``)."""
    metrics, rows = tuple(metrics), _of_headline(rows)
    present = {(row.domain, row.metric) for row in rows}
    domains = dict.fromkeys(row.domain for row in rows)
    columns = tuple(Column(d, m) for d in domains for m in metrics if (d, m) in present)
    cells = {(row.model, Column(row.domain, row.metric)): row for row in rows if row.metric in metrics}
    models = tuple(dict.fromkeys(row.model for row in rows if row.metric in metrics))
    best = {column: _best([cells[m, column] for m in models if (m, column) in cells]) for column in columns}
    return Pivot(models, columns, cells, best)


@dataclass(frozen=True)
class Breakdown:
    """One metric of a domain with many parts: parts x models."""

    domain: str
    metric: str
    parts: tuple[str, ...]
    models: tuple[str, ...]
    cells: dict[tuple[str, str], Row]

    @property
    def title(self) -> str:
        return f"{self.domain}: {metric_title(self.metric)}"


def breakdowns(rows: Sequence[Row]) -> list[Breakdown]:
    """The headline's metrics of every domain whose parts are too many for the headline."""
    found = []
    for domain, parts in _parts_apart(rows).items():
        for metric in HEADLINE:
            cells = {
                (row.domain.partition("/")[2], row.model): row for row in rows if row.metric == metric and row.domain in parts
            }
            if cells:
                names, models = (tuple(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
                found.append(Breakdown(domain, metric, names, models, cells))
    return found


def bar_of(row: Row) -> tuple[float, float, float] | None:
    """Value and interval as shares of the most that there can be; None for a metric without a most, or no finite value."""
    most = most_of(row.metric)
    if most is None or not row.is_finite:
        return None
    value, low, high = (min(1.0, max(0.0, end / most)) for end in (row.value, row.low, row.high))
    return value, low, high


def _of_headline(rows: Sequence[Row]) -> list[Row]:
    apart = _parts_apart(rows)
    return [row for row in rows if row.domain.partition("/")[0] not in apart or "/" not in row.domain]


def _parts_apart(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Domain -> its parts, for domains with many."""
    domains = dict.fromkeys(row.domain for row in rows)
    parts: dict[str, list[str]] = {}
    for domain in domains:
        whole = domain.partition("/")[0]
        if whole != domain and whole in domains:
            parts.setdefault(whole, []).append(domain)
    return {whole: found for whole, found in parts.items() if len(found) > _MANY_PARTS}


def sizes_of(rows: Sequence[Row]) -> dict[str, int]:
    """Domain of the headline -> the number of rows that it was measured on."""
    sizes: dict[str, int] = {}
    for row in _of_headline(rows):
        sizes[row.domain] = max(row.n, sizes.get(row.domain, 0))
    return sizes


def _best(rows: Sequence[Row]) -> frozenset[str]:
    finite = [row for row in rows if math.isfinite(row.value)]
    if len(rows) < 2 or not finite:
        return frozenset()
    metric, kind = split_comparison(finite[0].metric)
    choose = max if kind == "gain" or (kind is None and most_of(metric)) else min
    best = choose(round(row.value, 12) for row in finite)
    return frozenset(row.model for row in finite if round(row.value, 12) == best)


def format_table(rows: Sequence[Row]) -> str:
    """A plain-text table for a terminal: one line per model, one column per domain and metric, with ± half the interval."""
    table = pivot(rows)
    head = [["", *(column.heading for column in table.columns)], ["model", *(column.title for column in table.columns)]]
    for at in range(len(table.columns), 1, -1):
        if head[0][at] == head[0][at - 1]:
            head[0][at] = ""
    for model in table.models:
        cells = (table.cells.get((model, column)) for column in table.columns)
        head.append([model, *("" if row is None else _with_margin(row) for row in cells)])
    widths = [max(map(len, column)) for column in zip(*head, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in head]
    return "\n".join([*lines[:2], "  ".join("─" * width for width in widths), *lines[2:]])


def format_report(report: Report) -> str:
    """What a terminal shows of a report: the table, if there is anything in it, and what a reader must know."""
    notes = "\n".join(f"note: {note}" for note in report.notes)
    return "\n\n".join(part for part in (format_table(report.rows) if report.rows else "", notes) if part)


def _with_margin(row: Row) -> str:
    margin = format_value((row.high - row.low) / 2, split_comparison(row.metric)[0]).removesuffix("%")
    return f"{format_value(row.value, row.metric)} ±{margin}"
