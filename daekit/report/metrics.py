"""How each metric is called, written and compared: the one table of them that reports go by."""

from __future__ import annotations

import math
from typing import NamedTuple

from daekit.report.contents import Row


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        most: The most that there can be, where more is better; None where less is better.
        headline: Whether the first table of a report shows it.
        compared: Whether models have a gain or forgetting of it.
    """

    title: str
    most: float | None = None
    headline: bool = False
    compared: bool = False


METRICS = {
    "exact_match": Metric("exact match", 1, headline=True, compared=True),
    "answer_match": Metric("answer match", 1, headline=True, compared=True),
    "rouge_l": Metric("ROUGE-L", 1, compared=True),
    "token_accuracy": Metric("token accuracy", 1, compared=True),
    "accuracy": Metric("accuracy", 1, headline=True, compared=True),
    "accuracy_per_token": Metric("accuracy per token", 1, compared=True),
    "accuracy_per_byte": Metric("accuracy per byte", 1, compared=True),
    "acc": Metric("acc", 1, headline=True),
    "acc_norm": Metric("acc norm", 1, headline=True),
    "judge_score": Metric("score, 1 to 10", 10, headline=True),
    "pairwise_win_rate": Metric("games won", 1),
    "pairwise_win_rate_adjusted": Metric("games won, ties half", 1, headline=True),
    "position_consistency": Metric("position consistency", 1),
    "win_rate": Metric("win rate", 100, headline=True),
    "length_controlled_win_rate": Metric("LC win rate", 100, headline=True),
    "bits_per_byte": Metric("bits per byte", headline=True, compared=True),
    "nll": Metric("NLL", headline=True, compared=True),
    "kl_to_teacher": Metric("KL to teacher"),
    "kl_to_reference": Metric("KL to reference", headline=True),
}
SHARES = tuple(name for name, metric in METRICS.items() if metric.most == 1)
HEADLINE = tuple(name for name, metric in METRICS.items() if metric.headline)
COMPARISON = tuple(f"{name}_{kind}" for kind in ("gain", "forgetting") for name in HEADLINE if METRICS[name].compared)


def most_of(metric: str) -> float | None:
    """The most that there can be of a metric of which more is better; None for any other."""
    return METRICS[metric].most if metric in METRICS else None


def split_comparison(metric: str) -> tuple[str, str | None]:
    """``exact_match_gain`` -> ``("exact_match", "gain")``; ``nll`` -> ``("nll", None)``."""
    base, _, kind = metric.rpartition("_")
    return (base, kind) if kind in ("gain", "forgetting") else (metric, None)


def metric_title(metric: str) -> str:
    """``exact match``, ``exact match gain``..."""
    base, kind = split_comparison(metric)
    title = METRICS[base].title if base in METRICS else base.replace("_", " ")
    return title if kind is None else f"{title} {kind}"


def format_value(value: float, metric: str) -> str:
    """Percent for shares, nats to three digits; differences carry their sign."""
    base, kind = split_comparison(metric)
    if not math.isfinite(value):
        return "not finite"
    sign, most = "+" if kind else "", most_of(base)
    if most == 1:
        return _signed(f"{100 * value:{sign}.1f}", " pt" if kind else "%")
    if most == 100:
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
    low, high = (format_value(end, row.metric).removesuffix("%").removesuffix(" pt") for end in (row.low, row.high))
    return f"[{low}, {high}]"


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
