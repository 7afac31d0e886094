"""What a judge's text says: the strict reading. FastChat's own reading is FastChat's own code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_WINNER = re.compile(r"\[\[([ABC])\]\]")
_NAMES = {"A": "A", "B": "B", "C": "tie"}
LOWEST, HIGHEST = 1, 10
NO_RATING = -1  # FastChat's score of a reply in which it finds none


def strict_rating(text: str) -> float | None:
    """The last ``[[rating]]`` within 1 and 10: what stands before it may be a quotation of the answer."""
    ratings = [float(number) for number in _RATING.findall(text)]
    within = [rating for rating in ratings if LOWEST <= rating <= HIGHEST]
    return within[-1] if within else None


def strict_winner(text: str) -> str:
    """``A``, ``B`` or ``tie`` by the last verdict, or ``error`` where there is none, as FastChat calls them."""
    verdicts = _WINNER.findall(text)
    return _NAMES[verdicts[-1]] if verdicts else "error"


def strictly(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of FastChat's record that depend on how the judge's text is read."""
    if "judgment" in record:
        rating = strict_rating(record["judgment"])
        return {"score": NO_RATING if rating is None else rating}
    seats = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
    winners = [strict_winner(record[f"g{order}_judgment"]) for order in (1, 2)]
    return {f"g{at}_winner": seat.get(winner, winner) for at, seat, winner in zip((1, 2), seats, winners, strict=True)}


def is_rated(record: Mapping[str, Any]) -> bool:
    """Whether the judge's text held a rating, or a verdict in both orders."""
    if "score" in record:
        return record["score"] != NO_RATING
    return "error" not in (record["g1_winner"], record["g2_winner"])
