"""Prompts without their answers: what a model that writes rows is asked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from datasets import Dataset

from daekit.data.rows import RowCollector, RowError, form_of, value_of
from daekit.data.sources import placed_rows
from daekit.errors import UserError
from daekit.recipe.generated import PromptsSpec

_COLUMNS: tuple[Literal["prompt", "messages"], ...] = ("prompt", "messages")
_KEPT = ("tools", "chat_template_kwargs", "teacher_prompt")  # of a row beside its prompt
_ANSWER = {"role": "assistant", "content": "-"}  # stands for the answer, so that a prompt is checked as a row is


def load_prompts(where: str, spec: PromptsSpec) -> list[dict[str, Any]]:
    """The prompts of files or a hub data set: ``prompt``, or ``messages`` up to their last answer; answers are not read.

    Raises:
        UserError: no rows, or a row without a prompt.
    """
    assert spec.path is not None
    collector = RowCollector(where, {}, spec.chat)
    for place, row in islice(placed_rows(where, spec, spec.path, spec.split, spec.split), spec.limit):
        try:
            prompt, messages = (value_of(row, spec.columns.get(ours, ours)) for ours in _COLUMNS)
        except RowError as error:
            raise UserError(f"{where}: {place} {error}") from None
        extras = {key: row[key] for key in _KEPT if row.get(key) is not None}
        if prompt is None and isinstance(messages, list):
            prompt = _asked(messages)
        if prompt is None or prompt == []:
            raise UserError(
                f"{where}: {place} has no prompt; it needs `prompt` or `messages` with a turn to answer (other names: columns)"
            )
        collector.add({"prompt": prompt, "completion": [_ANSWER] if isinstance(prompt, list) else "-", **extras}, place)
    if not len(collector):
        raise UserError(f"{where}: {spec.path} (split {spec.split}) has no rows")
    return [_prompt(row) for row in collector.dataset("")]


def prompts_of(rows: Dataset, where: str, limit: int | None) -> list[dict[str, Any]]:
    """The prompts of a source's training rows.

    Raises:
        UserError: rows of text, which have none.
    """
    if form_of(rows) == "text":
        raise UserError(f"{where}: its rows are text, which has no prompt to answer; name a source of prompts")
    return [_prompt(row) for row in islice(rows, limit)]


def _asked(messages: list[Any]) -> list[Any]:
    """A conversation up to its last answer."""
    answers = [at for at, message in enumerate(messages) if isinstance(message, Mapping) and message.get("role") == "assistant"]
    return messages[: answers[-1]] if answers and answers[-1] == len(messages) - 1 else messages


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"] if row.get("prompt") is not None else _asked(row["messages"])
    return {"prompt": prompt, **{key: row[key] for key in _KEPT if row.get(key)}}
