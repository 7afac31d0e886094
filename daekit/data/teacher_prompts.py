"""Rows whose teacher is told more: ``teacher_prompt`` is what the teacher sees in place of the prompt.

A product page, retrieved passages or a demonstration stand in ``teacher_prompt`` beside the question; the student sees the
row's own prompt. Both see the same response, token for token (``daekit.models.teacher_view``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.protocol import IGNORE_INDEX
from daekit.recipe.objective import Objective

TEACHER_PROMPT = "teacher_prompt"
PROMPT_IDS_TYPE = List(Value("int32"))
_SHOWN = 8  # tokens of a response that differs


def teacher_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row of text or messages as its teacher sees it; one without ``teacher_prompt`` as it is.

    Of prompt and completion it replaces the prompt, of ``messages`` all that stands before the last assistant turn. A text in
    front of messages is the message of a user.

    Raises:
        UserError: a row without a prompt, or whose prompt is a text and its ``teacher_prompt`` messages.
    """
    rest, prompt = {key: value for key, value in row.items() if key != TEACHER_PROMPT}, row.get(TEACHER_PROMPT)
    if prompt is None:
        return rest
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if row.get("prompt") is not None and row.get("completion") is not None:
        if isinstance(row["prompt"], str) and not isinstance(prompt, str):
            raise UserError(f"{where}: teacher_prompt is messages and prompt a text; give both as texts, or both as messages")
        return rest | {"prompt": prompt if isinstance(row["prompt"], str) else messages}
    turns = [place for place, message in enumerate(row.get("messages") or ()) if message["role"] == "assistant"]
    if not turns:
        raise UserError(
            f"{where}: has a teacher_prompt, but neither prompt and completion nor an assistant turn, so there is no response "
            "before which it could stand (of a text all tokens carry loss). Give prompt and completion, or messages"
        )
    return rest | {"messages": [*messages, *row["messages"][turns[-1] :]]}


class TeacherPrompts:
    """Finds the tokens of ``teacher_prompt`` by comparing a row with the row that its teacher sees, and counts what cannot be.

    Args:
        tokenizer: the one tokenizer of student and teacher.
        name: what the error calls the rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.rows, self._wrong = 0, 0
        self._first = ""

    def ids(self, own: Mapping[str, Any], seen: Mapping[str, Any], where: str) -> list[int]:
        """The teacher's tokens before the response; none where the responses differ, which ``raise_if_any`` tells.

        Args:
            own: ``input_ids`` and ``labels`` of the row.
            seen: the same of the row as its teacher sees it.
            where: name of the row.
        """
        self.rows += 1
        first, start = _first_label(own["labels"]), _first_label(seen["labels"])
        same = all(own[key][first:] == seen[key][start:] for key in ("input_ids", "labels"))
        if first > 0 and start > 0 and same:
            return list(seen["input_ids"][:start])
        self._wrong += 1
        self._first = self._first or f"{where}: {self._difference(own, seen, first, start)}"
        return []

    def raise_if_any(self) -> None:
        """UserError: rows whose response is not the same tokens for student and teacher."""
        if self._wrong:
            raise UserError(
                f"{self.name}: {self._wrong:,} of {self.rows:,} rows with a teacher_prompt cannot be followed, for their "
                f"response is not the same tokens behind both prompts. The first: {self._first}"
            )

    def _difference(self, own: Mapping[str, Any], seen: Mapping[str, Any], first: int, start: int) -> str:
        if first == 0 or start == 0:
            return (
                "its first token carries loss, so nothing stands before a response; teacher_prompt needs loss on responses only"
            )
        pieces = [sum(loss for loss, _ in groupby(row["labels"], lambda label: label != IGNORE_INDEX)) for row in (own, seen)]
        if pieces[0] != pieces[1]:
            return (
                f"{pieces[0]} stretches of it carry loss (assistant turns), and teacher_prompt stands in place of all before "
                "the last assistant turn. Give one row per turn, as prompt and completion"
            )
        ours, theirs = own["input_ids"][first:], seen["input_ids"][start:]
        place = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        shown = [self.tokenizer.decode(each[place : place + _SHOWN]) for each in (ours, theirs)]
        return (
            f"from its token {place + 1} on it is {shown[0]!r} behind the prompt, {shown[1]!r} behind teacher_prompt. Tokens "
            "merge where prompt and response meet: let teacher_prompt end as the prompt does (white space, line end)"
        )


def with_teacher_prompts(
    own: Dataset, seen: Dataset, given: Sequence[bool], tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset:
    """Tokenised rows with the column ``teacher_prompt_ids``; an empty list where the teacher sees what the student sees.

    Args:
        own: rows as the student sees them.
        seen: the same rows as their teacher sees them.
        given: whether a row has a ``teacher_prompt``.
        tokenizer: the one tokenizer of student and teacher.
        name: name of the data set, for errors.

    Raises:
        UserError: see ``TeacherPrompts``.
    """
    prompts, columns = TeacherPrompts(tokenizer, f"the {name} data set"), ["input_ids", "labels"]
    rows = zip(own.select_columns(columns), seen.select_columns(columns), given, strict=True)
    found = [prompts.ids(row, other, f"row {place}") if told else [] for place, (row, other, told) in enumerate(rows)]
    prompts.raise_if_any()
    return own.add_column(TEACHER_PROMPT_IDS, found, feature=PROMPT_IDS_TYPE)


def require_followed(objective: Objective, splits_rows: bool) -> None:
    """Refuse what cannot be had where teacher and student see other tokens.

    Args:
        objective: the student's.
        splits_rows: whether packing splits rows over two blocks.

    Raises:
        UserError: attention or hidden-state losses; rows that are split.
    """
    for name in ("attention_weight", "hidden_weight"):
        if value := getattr(objective, name):
            raise UserError(
                f"{name}={value}: rows have a teacher_prompt, so the teacher attends to tokens that the student does not see, "
                "and its layers hold what these say: they have no counterpart in the student. Set it to 0"
            )
    if splits_rows:
        raise UserError(
            "packing_strategy: it splits rows, and the second part of a row would follow no teacher_prompt. Use 'bfd', or no "
            "packing"
        )


def pack_with_prompts(pack: Any, rows: Dataset) -> Dataset:
    """Pack rows by TRL, which keeps ids and labels alone: the number of each row travels as the label of its first token.

    That token is predicted by nothing, so its label means nothing.

    Args:
        pack: packs a data set, without splitting rows.
        rows: tokenised rows with ``teacher_prompt_ids``.

    Returns:
        Packed examples, whose ``teacher_prompt_ids`` are a list per row.
    """
    prompts, behind = rows[TEACHER_PROMPT_IDS], IGNORE_INDEX - 1
    numbered = rows.map(lambda row, place: {"labels": [behind - place, *row["labels"][1:]]}, with_indices=True)
    packed: Dataset = pack(numbered)

    def told(example: Mapping[str, Any]) -> dict[str, Any]:
        labels, found, start = list(example["labels"]), [], 0
        for length in example["seq_lengths"]:
            found.append(prompts[behind - labels[start]])
            labels[start] = IGNORE_INDEX
            start += length
        return {"labels": labels, TEACHER_PROMPT_IDS: found}

    return packed.map(told, features=Features({**packed.features, TEACHER_PROMPT_IDS: List(PROMPT_IDS_TYPE)}))


def _first_label(labels: Sequence[int]) -> int:
    """Place of the first label; behind the end if there is none."""
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
