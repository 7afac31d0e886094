"""FastChat's records -> report rows, with the numbers that ``show_result`` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from daekit.evaluation.evaluate import SEED
from daekit.evaluation.intervals import RowValues, interval
from daekit.evaluation.judging.verdicts import is_rated
from daekit.report.rows import Row

Record = Mapping[str, Any]
_NAME = "mt_bench"


def single_rows(model: str, records: Sequence[Record], questions: Sequence[Record], rounds: int) -> list[Row]:
    """Mean ratings: of everything, of each turn, of each category."""
    rated = [record for record in records if is_rated(record)]
    categories = {question["question_id"]: question["category"] for question in questions}
    parts = {_NAME: rated}
    for turn in (1, 2):
        parts[f"{_NAME}/turn_{turn}"] = [record for record in rated if record["turn"] == turn]
    for category in dict.fromkeys(categories.values()):
        parts[f"{_NAME}/{category}"] = [record for record in rated if categories[record["question_id"]] == category]
    rows = []
    for domain, its in parts.items():
        rows += _row(model, domain, "judge_score", its, lambda record: record["score"], rounds)
    return rows


def pair_rows(model: str, records: Sequence[Record], rounds: int) -> list[Row]:
    """Shares of games: won, won with ties as halves, and judged the same in both orders."""
    rated = [record for record in records if is_rated(record)]
    metrics: dict[str, Callable[[Record], float]] = {
        "pairwise_win_rate": lambda record: float(_points(record, model) == 1),
        "pairwise_win_rate_adjusted": lambda record: _points(record, model),
        "position_consistency": lambda record: float(record["g1_winner"] == record["g2_winner"]),
    }
    rows = []
    for metric, value in metrics.items():
        rows += _row(model, _NAME, metric, rated, value, rounds)
        for turn in (1, 2):
            its = [record for record in rated if record["turn"] == turn]
            rows += _row(model, f"{_NAME}/turn_{turn}", metric, its, value, rounds)
    return rows


def _points(record: Record, model: str) -> float:
    """1 for a win in both orders, 0 for a loss in both, else a tie."""
    if record["g1_winner"] == "tie" or record["g1_winner"] != record["g2_winner"]:
        return 0.5
    return float(record[record["g1_winner"]] == model)


def _row(
    model: str, domain: str, metric: str, records: Sequence[Record], value: Callable[[Record], float], rounds: int
) -> list[Row]:
    """The mean over records; what is resampled are the questions, whose turns and games belong together."""
    if not records:
        return []
    by_question: dict[int, list[float]] = {}
    for record in records:
        by_question.setdefault(record["question_id"], []).append(value(record))
    values = RowValues(
        np.array([sum(its) for its in by_question.values()], dtype=np.float64),
        np.array([len(its) for its in by_question.values()], dtype=np.float64),
    )
    low, high = interval(values, rounds, SEED)
    return [Row(model, domain, metric, values.mean, low, high, len(by_question))]
