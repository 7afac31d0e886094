"""What a judge's text says, read strictly, and FastChat's records as report rows, with the numbers that ``show_result`` prints.

FastChat's own reading is FastChat's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from daekit.evaluation.intervals import RowValues
from daekit.report.contents import Row

Record = Mapping[str, Any]
_NAME = "mt_bench"
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_WINNER = re.compile(r"\[\[([ABC])\]\]")
LOWEST, HIGHEST = 1, 10
NO_RATING = -1  # FastChat's score of a reply in which it finds none


def strict_rating(text: str) -> float | None:
    """The last ``[[rating]]`` within 1 and 10: what stands before it may be a quotation of the answer."""
    within = [rating for rating in map(float, _RATING.findall(text)) if LOWEST <= rating <= HIGHEST]
    return within[-1] if within else None


def strict_winner(text: str) -> str:
    """``A``, ``B`` or ``tie`` by the last verdict, or ``error`` where there is none, as FastChat calls them."""
    verdicts = _WINNER.findall(text)
    return {"A": "A", "B": "B", "C": "tie"}[verdicts[-1]] if verdicts else "error"


def strictly(record: Record) -> dict[str, Any]:
    """The entries of FastChat's record that depend on how the judge's text is read."""
    if "judgment" in record:
        rating = strict_rating(record["judgment"])
        return {"score": NO_RATING if rating is None else rating}
    seats = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
    winners = [strict_winner(record[f"g{order}_judgment"]) for order in (1, 2)]
    return {f"g{at}_winner": seat.get(winner, winner) for at, seat, winner in zip((1, 2), seats, winners, strict=True)}


def is_rated(record: Record) -> bool:
    """Whether the judge's text held a rating, or a verdict in both orders."""
    if "score" in record:
        return record["score"] != NO_RATING
    return "error" not in (record["g1_winner"], record["g2_winner"])


def unread_text(record: Record) -> str:
    """The judge's text, of a pair in the first order, that held no verdict."""
    if "score" in record:
        return str(record["judgment"])
    return str(next(record[f"g{order}_judgment"] for order in (1, 2) if record[f"g{order}_winner"] == "error"))


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
    return [values.row(model, domain, metric, rounds)]
