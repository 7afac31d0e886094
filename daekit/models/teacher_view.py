"""What a teacher sees of a tokenised row: the row itself, or other tokens in front of the same response.

A row whose teacher is told more has ``teacher_prompt_ids``. They stand in place of all tokens before the first one that carries
loss; from there on student and teacher see the same tokens, so that loss positions are the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from daekit.protocol import IGNORE_INDEX

TEACHER_PROMPT_IDS = "teacher_prompt_ids"
TOKEN_COLUMNS = ("input_ids", "labels", "seq_lengths", "domain", TEACHER_PROMPT_IDS)


def is_told_more(example: Mapping[str, Any]) -> bool:
    """Whether a tokenised row, or one row of a packed example, has tokens for its teacher alone."""
    prompts = example.get(TEACHER_PROMPT_IDS)
    if prompts is None or not len(prompts):
        return False
    return "seq_lengths" not in example or any(len(prompt) for prompt in prompts)


def as_teacher_sees(example: Mapping[str, Any]) -> dict[str, Any]:
    """The ``input_ids``, ``labels`` and, where rows are packed, ``seq_lengths`` of an example for its teacher.

    Args:
        example: ``input_ids``, ``labels`` and ``teacher_prompt_ids``: the tokens of one row, or of a packed example one list
            per row; an empty list: the row is the same for student and teacher.
    """
    ids, labels, prompts = example["input_ids"], example["labels"], example[TEACHER_PROMPT_IDS]
    packed = "seq_lengths" in example
    rows = zip(example["seq_lengths"], prompts, strict=True) if packed else [(len(ids), prompts)]
    seen_ids: list[int] = []
    seen_labels: list[int] = []
    lengths, start = [], 0
    for length, prompt in rows:
        end, first = start + int(length), start
        if len(prompt):
            first = start + first_loss(labels[start:end])
        seen_ids += [*map(int, prompt), *map(int, ids[first:end])]
        seen_labels += [IGNORE_INDEX] * len(prompt) + [*map(int, labels[first:end])]
        lengths.append(len(prompt) + end - first)
        start = end
    return {"input_ids": seen_ids, "labels": seen_labels} | ({"seq_lengths": lengths} if packed else {})


def first_loss(labels: Any) -> int:
    """Place of the first token that carries loss: not the first of the row, which is predicted by nothing."""
    return 1 + int(np.argmax(np.asarray(labels)[1:] != IGNORE_INDEX))


def last_response(labels: Any) -> int:
    """Where the last stretch of tokens that carry loss begins; what comes before is the prompt of a rollout."""
    carries = np.asarray(labels) != IGNORE_INDEX
    last = int(carries.nonzero()[0][-1])
    before = (~carries[:last]).nonzero()[0]
    return int(before[-1]) + 1 if len(before) else 0
