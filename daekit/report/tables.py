"""Arranges rows as tables; terminal, Markdown and HTML share the headline table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from daekit.report.contents import Row

TITLES = {
    "exact_match": "exact match",
    "answer_match": "answer match",
    "rouge_l": "ROUGE-L",
    "nll": "NLL",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "accuracy_per_token": "accuracy per token",
    "accuracy_per_byte": "accuracy per byte",
    "kl_to_teacher": "KL to teacher",
    "kl_to_reference": "KL to reference",
    "judge_score": "score, 1 to 10",
    "pairwise_win_rate": "games won",
    "pairwise_win_rate_adjusted": "games won, ties half",
    "length_controlled_win_rate": "LC win rate",
}
# between 0 and 1, more is better
SHARES = (
    "exact_match",
    "answer_match",
    "rouge_l",
    "token_accuracy",
    "accuracy",
    "accuracy_per_token",
    "accuracy_per_byte",
    "pairwise_win_rate",
    "pairwise_win_rate_adjusted",
    "position_consistency",
    "acc",
    "acc_norm",
)
# more is better, and the most that there can be
_MOST = dict.fromkeys(SHARES, 1.0) | {"judge_score": 10.0, "win_rate": 100.0, "length_controlled_win_rate": 100.0}
_PERCENT = ("win_rate", "length_controlled_win_rate")
_DIFFERING = ("exact_match", "answer_match", "accuracy", "bits_per_byte", "nll")
HEADLINE = (
    "exact_match",
    "answer_match",
    "accuracy",
    "acc",
    "acc_norm",
    "judge_score",
    "pairwise_win_rate_adjusted",
    "win_rate",
    "length_controlled_win_rate",
    "bits_per_byte",
    "nll",
    "kl_to_reference",
)
COMPARISON = tuple(f"{metric}_{kind}" for kind in ("gain", "forgetting") for metric in _DIFFERING)
_MANY_PARTS = 4  # parts of a domain (``blimp/wh_island``) beyond which they are shown apart


@dataclass(frozen=True)
class Column:
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

    def cell(self, model: str, column: Column) -> Row | None:
        return self.cells.get((model, column))


def metric_title(metric: str) -> str:
    """``exact match``, ``exact match gain``..."""
    base, kind = split_comparison(metric)
    title = TITLES.get(base, base.replace("_", " "))
    return title if kind is None else f"{title} {kind}"


def split_comparison(metric: str) -> tuple[str, str | None]:
    """``exact_match_gain`` -> ``("exact_match", "gain")``; ``nll`` -> ``("nll", None)``."""
    for kind in ("gain", "forgetting"):
        if metric.endswith(f"_{kind}"):
            return metric.removesuffix(f"_{kind}"), kind
    return metric, None


def blocks(table: Pivot, most: int = 7) -> list[Pivot]:
    """The table in parts of at most ``most`` columns, so that a page need not be scrolled; a domain's columns stay together."""
    parts: list[list[Column]] = [[]]
    for domain in dict.fromkeys(column.domain for column in table.columns):
        columns = [column for column in table.columns if column.domain == domain]
        if parts[-1] and len(parts[-1]) + len(columns) > most:
            parts.append([])
        parts[-1] += columns
    return [replace(table, columns=tuple(part)) for part in parts]


def pivot(rows: Sequence[Row], metrics: Iterable[str] = HEADLINE) -> Pivot:
    """Models down, domains and ``metrics`` across, each in the order of their first row; without the parts of domains that
    have many (see ``breakdowns``)."""
    metrics, apart = tuple(metrics), set(_parts_apart(rows))
    rows = [row for row in rows if row.domain.partition("/")[0] not in apart or "/" not in row.domain]
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

    def cell(self, part: str, model: str) -> Row | None:
        return self.cells.get((part, model))


def breakdowns(rows: Sequence[Row]) -> list[Breakdown]:
    """The headline's metrics of every domain whose parts are too many for the headline."""
    found = []
    for domain, parts in _parts_apart(rows).items():
        for metric in HEADLINE:
            inside = [row for row in rows if row.metric == metric and row.domain in parts]
            if inside:
                names = tuple(dict.fromkeys(row.domain.partition("/")[2] for row in inside))
                models = tuple(dict.fromkeys(row.model for row in inside))
                cells = {(row.domain.partition("/")[2], row.model): row for row in inside}
                found.append(Breakdown(domain, metric, names, models, cells))
    return found


def bar_of(row: Row) -> tuple[float, float, float] | None:
    """Value and interval as shares of the most that there can be; None for a metric without a most, or no finite value."""
    most = _MOST.get(row.metric)
    ends = (row.value, row.low, row.high)
    if most is None or not all(math.isfinite(end) for end in ends):
        return None
    value, low, high = (min(1.0, max(0.0, end / most)) for end in ends)
    return value, low, high


def _parts_apart(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Domain -> its parts, for domains with many."""
    domains = dict.fromkeys(row.domain for row in rows)
    parts: dict[str, list[str]] = {}
    for domain in domains:
        whole, slash, _ = domain.partition("/")
        if slash and whole in domains:
            parts.setdefault(whole, []).append(domain)
    return {whole: found for whole, found in parts.items() if len(found) > _MANY_PARTS}


def sizes_of(rows: Sequence[Row]) -> dict[str, int]:
    """Domain -> the number of rows that it was measured on."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.domain] = max(row.n, sizes.get(row.domain, 0))
    return sizes


def _best(rows: Sequence[Row]) -> frozenset[str]:
    finite = [row for row in rows if math.isfinite(row.value)]
    if len(rows) < 2 or not finite:
        return frozenset()
    metric, kind = split_comparison(finite[0].metric)
    choose = max if kind == "gain" or (kind is None and metric in _MOST) else min
    best = choose(round(row.value, 12) for row in finite)
    return frozenset(row.model for row in finite if round(row.value, 12) == best)


def format_value(value: float, metric: str) -> str:
    """Percent for shares, nats to three digits; differences carry their sign."""
    base, kind = split_comparison(metric)
    if not math.isfinite(value):
        return "not finite"
    sign = "+" if kind else ""
    if base in SHARES:
        return _signed(f"{100 * value:{sign}.1f}", "%" if kind is None else " pt")
    if base in _PERCENT:
        return _signed(f"{value:.1f}", "%")
    if base == "judge_score":
        return _signed(f"{value:.2f}", "")
    if base == "missing_judgments":
        return f"{value:.0f}"
    if base == "perplexity" and abs(value) >= 1e5:
        return f"{value:.2e}"
    return _signed(f"{value:{sign}.3f}", "")


def _signed(number: str, unit: str) -> str:
    if float(number) == 0:
        number = number.lstrip("+-")
    return number.replace("-", "−") + unit


def format_interval(row: Row) -> str:
    """``[96.0, 98.5]`` in the unit of the value."""
    ends = (format_value(end, row.metric).removesuffix("%").removesuffix(" pt") for end in (row.low, row.high))
    return "[{}, {}]".format(*ends)


def format_table(rows: Sequence[Row], metrics: Iterable[str] = HEADLINE) -> str:
    """A plain-text table for a terminal: one line per model, one column per domain and metric, with ± half the interval."""
    table = pivot(rows, metrics)
    head = [["", *(column.heading for column in table.columns)], ["model", *(column.title for column in table.columns)]]
    for at in range(len(table.columns), 1, -1):
        if head[0][at] == head[0][at - 1]:
            head[0][at] = ""
    body = []
    for model in table.models:
        cells = (table.cell(model, column) for column in table.columns)
        body.append([model, *("" if row is None else _with_margin(row) for row in cells)])
    return "\n".join(_aligned([*head, *body], rule_after=2))


def _with_margin(row: Row) -> str:
    margin = format_value((row.high - row.low) / 2, split_comparison(row.metric)[0]).removesuffix("%")
    return f"{format_value(row.value, row.metric)} ±{margin}"


def _aligned(lines: Sequence[Sequence[str]], rule_after: int) -> list[str]:
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [*text[:rule_after], "  ".join("─" * width for width in widths), *text[rule_after:]]


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
