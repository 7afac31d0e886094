"""Multiple choice by likelihood: which of the given choices does the model find likeliest?"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError, nearest
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood.common import (
    Measured,
    TokenRow,
    describe_prefix,
    encode,
    hash_of,
    json_lines,
    prefix_ids,
    read_bytes,
    require_context,
    token_row,
)
from daekit.models.scoring import score_rows
from daekit.models.vocabulary import vocabulary_size
from daekit.progress import ProgressFunction
from daekit.recipe.suite import MultipleChoiceSpec


@dataclass(frozen=True)
class Question:
    """What stands before the choices, the choices with their separator, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoice:
    """Questions read from a file.

    Raises:
        UserError: an unreadable file, a row without a column of the prompt, with fewer than two choices or an answer that is
            none of them.
    """

    def __init__(self, name: str, spec: MultipleChoiceSpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        path = Path(spec.path).expanduser()
        content = read_bytes(path, self.where)
        self.data = {path.name: hash_of(content)}
        lines = list(json_lines(content, path, self.where))[: spec.limit]
        self.questions = [self._question(row, place) for place, row in lines]
        if not self.questions:
            raise UserError(f"{self.where}: {path} has no questions")

    def check(self, name: str, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> None:
        """Every question fits."""
        longest = max(len(row["input_ids"]) for row in self._rows(tokenizer)[0])
        require_context(name, self.where, longest, context_length, "leave the longer questions out of the file")

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: ProgressFunction | None = None,
    ) -> Measured:
        """``accuracy``, ``accuracy_per_token`` and ``accuracy_per_byte``."""
        rows, merged = self._rows(tokenizer)
        scores = score_rows(model, rows, vocab_size=vocabulary_size(tokenizer), batch_size=batch_size, progress=progress)
        found, start = Measured(), 0
        right: dict[str, list[bool]] = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}
        ties = 0
        for index, question in enumerate(self.questions):
            part = slice(start, start + len(question.choices))
            start += len(question.choices)
            sizes = np.array([len(choice.strip().encode()) for choice in question.choices])
            log_p = -scores.nll_R[part]
            ways = {"accuracy": log_p, "accuracy_per_token": log_p / scores.tokens_R[part], "accuracy_per_byte": log_p / sizes}
            for metric, values in ways.items():
                right[metric].append(bool(values[question.answer] > np.delete(values, question.answer).max()))
            ties += int((log_p == log_p.max()).sum() > 1)
            found.items.append({"row": index, "answer": question.answer, "log_p": log_p.tolist()})
        for metric, hits in right.items():
            found.values[self.name, self.name, metric] = RowValues(np.array(hits, dtype=np.float64), np.ones(len(hits)))
        prefix = describe_prefix(tokenizer, self.spec.prefix, self.where)
        merging = (
            f"; in {merged} of them tokens merge across the boundary, and the merged token is scored too" if merged else ""
        )
        found.notes.append(
            f"{self.name}: {len(self.questions)} questions by the likelihood of their choices{merging}; "
            f"{prefix.split(', and')[0]}; {ties} ties for the first place, which count as wrong."
        )
        return found

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenRow], int]:
        """One row per choice, scored from where the choices of a question begin to differ from its prompt; and how many
        questions that is earlier than at the end of the prompt."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        prompts = encode(tokenizer, [question.prompt for question in self.questions])
        wholes = encode(tokenizer, [question.prompt + choice for question in self.questions for choice in question.choices])
        rows, merged, start = [], 0, 0
        for question, prompt in zip(self.questions, prompts, strict=True):
            texts = wholes[start : start + len(question.choices)]
            start += len(question.choices)
            shared = min(_common_prefix(prompt, ids) for ids in texts)
            merged += shared < len(prompt)
            # without a prefix nothing predicts the first token of all
            rows += [token_row(before + ids, max(len(before) + shared, 1)) for ids in texts]
        return rows, merged

    def _question(self, row: Mapping[str, Any], place: str) -> Question:
        try:
            prompt = string.Formatter().vformat(self.spec.prompt, (), row)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"{place}: prompt={self.spec.prompt!r} does not fit the row ({error}); it has {', '.join(map(repr, row))}. "
                "Set prompt; a brace of its own is written twice"
            ) from None
        choices = row.get(self.spec.choices)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
            hint = nearest(self.spec.choices, row) if self.spec.choices not in row else ""
            raise UserError(f"{place}: needs a list of at least two texts in {self.spec.choices!r}{hint}")
        separated = tuple(self.spec.separator + choice for choice in choices)
        return Question(prompt, separated, self._answer(row.get(self.spec.answer), choices, place))

    def _answer(self, answer: Any, choices: Sequence[str], place: str) -> int:
        """Its index; a letter counts only where it is not itself one of the choices."""
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            return answer
        if isinstance(answer, str) and list(choices).count(answer) == 1:
            return choices.index(answer)
        if isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer.upper()) - ord("A") < len(choices):
            return ord(answer.upper()) - ord("A")
        raise UserError(
            f"{place}: {self.spec.answer!r} is {answer!r}; it must be the index (from 0), the letter or the text of one of "
            f"the choices"
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
