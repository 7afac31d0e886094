"""The questions that models are asked: MT-Bench's file and AlpacaEval's instructions as conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.evaluation.likelihood.common import hash_of, lines, read_text

# fastchat.llm_judge.common.temperature_config of fschat 0.2.36; other categories: gen_model_answer's default
TEMPERATURES = {
    **{"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
    **{"stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0},
}
_OTHER = 0.7


@dataclass(frozen=True)
class Conversation:
    """A user's turns, asked one after the other.

    Attributes:
        id: FastChat's ``question_id``.
        category: such as ``writing``.
        turns: what the user says.
        temperature: Temperature of all its answers; 0 is greedy.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    temperature: float


def mt_bench_conversations(
    path: Path, where: str, limit: int | None, temperature: float | None
) -> tuple[list[Conversation], str]:
    """The conversations of FastChat's ``question.jsonl``, and the hash of the file.

    Args:
        where: how error messages begin.
        limit: How many conversations are taken, from the first on.
        temperature: The temperature of all categories, instead of FastChat's.

    Raises:
        UserError: the file cannot be read, or a line is no question.
    """
    found = []
    for place, row in lines(path, where):
        turns = row.get("turns")
        texts = isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) and turn.strip() for turn in turns)
        if not isinstance(row.get("question_id"), int) or not isinstance(row.get("category"), str) or not texts:
            raise UserError(
                f"{place}: needs question_id (a number), category and turns (a list of texts), as FastChat's question.jsonl"
            )
        own = TEMPERATURES.get(row["category"], _OTHER) if temperature is None else temperature
        found.append(Conversation(row["question_id"], row["category"], tuple(row["turns"]), own))
    if len({each.id for each in found}) < len(found) or not found:
        raise UserError(f"{where}: {path} has no questions, or one question_id twice")
    return found[:limit], hash_of(path, where)


def alpaca_conversations(path: Path, where: str, limit: int | None, temperature: float) -> tuple[list[Conversation], str]:
    """One conversation per row of AlpacaEval's reference outputs (a JSON list or JSON lines with ``instruction``), and the
    file's hash."""
    rows: Any
    if path.suffix == ".json":
        try:
            rows = json.loads(read_text(path, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {path} is not JSON ({error})") from None
    else:
        rows = [row for _, row in lines(path, where)]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: {path} must hold a list of rows with `instruction`")
    found = []
    for at, row in enumerate(rows):
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"{where}: {path}, row {at} has no text in `instruction`")
        found.append(Conversation(at, str(row.get("dataset", "alpaca_eval")), (instruction,), temperature))
    return found[:limit], hash_of(path, where)
