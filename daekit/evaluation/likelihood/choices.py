"""Minimal pairs (BLiMP) and multiple choice: which of several texts does the model find likeliest?"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.errors import UserError, nearest
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood import common
from daekit.evaluation.likelihood.common import Measured, TokenRow, prefix_ids, text_of
from daekit.models.scoring import score_rows
from daekit.models.vocabulary import vocabulary_size
from daekit.progress import ProgressFunction
from daekit.recipe.suite import MinimalPairsSpec, MultipleChoiceSpec


class MinimalPairs:
    """Paradigms of sentence pairs, read from files.

    Raises:
        UserError: no files, an empty one, a row without both sentences. (BLiMP itself has pairs of twice the same sentence:
            they are ties.)
    """

    def __init__(self, name: str, spec: MinimalPairsSpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        path = Path(spec.path).expanduser()
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{self.where}.path: the directory {path} holds no .jsonl file")
        self.pairs: dict[str, list[tuple[str, str]]] = {}
        for file in files:
            rows = common.lines(file, self.where)
            pairs = [(text_of(row, spec.good, place), text_of(row, spec.bad, place)) for place, row in rows]
            if not pairs:
                raise UserError(f"{self.where}: {file} has no pairs")
            self.pairs[file.stem] = pairs[: spec.limit]
        self.data = {file.name: common.hash_of(file, self.where) for file in files}

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """The prefix exists, and every sentence fits."""
        longest = max(map(len, self._sentences(tokenizer)))
        common.require_context(name, self.where, longest, context_length, "leave the longer pairs out of the files")

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """``accuracy`` per paradigm; the domain's own value is their macro average, whatever their sizes.

        Each sentence is scored once, so that equal token sequences are exact ties.
        """
        sentences, start = self._sentences(tokenizer), len(prefix_ids(tokenizer, self.spec.prefix, self.where))
        index = {ids: at for at, ids in enumerate(dict.fromkeys(map(tuple, sentences)))}
        rows = [common.token_row(ids, start) for ids in index]
        size = vocabulary_size(tokenizer)
        log_p = -score_rows(model, rows, vocab_size=size, batch_size=batch_size, progress=progress).nll_R
        log_p = log_p[[index[tuple(ids)] for ids in sentences]]
        goods, bads = log_p[0::2], log_p[1::2]
        found, start = Measured(), 0
        for paradigm, pairs in self.pairs.items():
            part = slice(start, start + len(pairs))
            start += len(pairs)
            right = (goods[part] > bads[part]).astype(np.float64)
            weight = np.full(len(pairs), 1 / len(pairs))  # all paradigms count alike in the sum over all of them
            found.values[self.name, paradigm, "accuracy"] = RowValues(right * weight, weight)
            found.items += [
                {"paradigm": paradigm, "row": at, "good": float(good), "bad": float(bad), "correct": bool(good > bad)}
                for at, (good, bad) in enumerate(zip(goods[part], bads[part], strict=True))
            ]
        found.notes.append(
            f"{self.name}: {len(self.pairs)} paradigms, {len(goods)} pairs, macro average; summed log-probability of both "
            f"sentences; {common.describe_prefix(tokenizer, self.spec.prefix, self.where)}; {int((goods == bads).sum())} ties, "
            "which count as wrong."
        )
        return found

    def _sentences(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of all sentences, good and bad in turn."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        texts = [sentence for pairs in self.pairs.values() for pair in pairs for sentence in pair]
        return [before + ids for ids in common.encode(tokenizer, texts)]


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
        self.questions = [self._question(row, place) for place, row in islice(common.lines(path, self.where), spec.limit)]
        if not self.questions:
            raise UserError(f"{self.where}: {path} has no questions")
        self.data = {path.name: common.hash_of(path, self.where)}

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """Every question fits."""
        longest = max(len(row["input_ids"]) for row in self._rows(tokenizer)[0])
        common.require_context(name, self.where, longest, context_length, "leave the longer questions out of the file")

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """``accuracy``, ``accuracy_per_token`` and ``accuracy_per_byte``."""
        rows, merged = self._rows(tokenizer)
        scores = score_rows(model, rows, vocab_size=vocabulary_size(tokenizer), batch_size=batch_size, progress=progress)
        found, start, ties = Measured(), 0, 0
        right: dict[str, list[float]] = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}
        for index, question in enumerate(self.questions):
            part = slice(start, start + len(question.choices))
            start += len(question.choices)
            log_p, sizes = -scores.nll_R[part], np.array([len(choice.strip().encode()) for choice in question.choices])
            for metric, values in zip(right, (log_p, log_p / scores.tokens_R[part], log_p / sizes), strict=True):
                right[metric].append(values[question.answer] > np.delete(values, question.answer).max())
            ties += int((log_p == log_p.max()).sum() > 1)
            found.items.append({"row": index, "answer": question.answer, "log_p": log_p.tolist()})
        for metric, hits in right.items():
            found.values[self.name, self.name, metric] = RowValues.of(hits)
        prefix = common.describe_prefix(tokenizer, self.spec.prefix, self.where).split(", and")[0]
        merging = f"; in {merged} of them tokens merge across the boundary, and the merged token is scored too"
        found.notes.append(
            f"{self.name}: {len(self.questions)} questions by the likelihood of their choices{merging if merged else ''}; "
            f"{prefix}; {ties} ties for the first place, which count as wrong."
        )
        return found

    def _rows(self, tokenizer: Tokenizer) -> tuple[list[TokenRow], int]:
        """One row per choice, scored from where the choices of a question begin to differ from its prompt; and how many
        questions that is earlier than at the end of the prompt."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        prompts = common.encode(tokenizer, [question.prompt for question in self.questions])
        texts = [question.prompt + choice for question in self.questions for choice in question.choices]
        wholes = iter(common.encode(tokenizer, texts))
        rows, merged = [], 0
        for question, prompt in zip(self.questions, prompts, strict=True):
            its = list(islice(wholes, len(question.choices)))
            columns = zip(prompt, *its, strict=False)
            shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
            merged += shared < len(prompt)
            # without a prefix nothing predicts the first token of all
            rows += [common.token_row(before + ids, max(len(before) + shared, 1)) for ids in its]
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
        if isinstance(answer, str) and choices.count(answer) == 1:
            return choices.index(answer)
        index = ord(answer.upper()) - ord("A") if isinstance(answer, str) and len(answer) == 1 else answer
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(choices):
            return index
        raise UserError(
            f"{place}: {self.spec.answer!r} is {answer!r}; it must be the index (from 0), the letter or the text of one of "
            "the choices"
        )
