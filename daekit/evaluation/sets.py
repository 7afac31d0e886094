"""Validation rows, tokenised as they are for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from daekit.data.tokenize import TokenizedRow, tokenize_each
from daekit.errors import UserError


@dataclass(frozen=True)
class EvaluationSet:
    """The validation rows of one source.

    Attributes:
        left_out: places in the data of the rows that were left out because they are longer than ``max_length`` tokens.
    """

    domain: str
    rows: tuple[TokenizedRow, ...]
    max_length: int | None = None
    left_out: tuple[int, ...] = ()

    def fingerprint(self) -> str:
        """A hash of all that is measured on the rows: tokens, which of them are scored, prompts, right answers."""
        digest = hashlib.sha256()
        for row in self.rows:
            prompts = [None if ids is None else list(ids) for ids in (row.prompt_ids, row.teacher_prompt_ids)]
            digest.update(repr((list(row.input_ids), list(row.labels), *prompts, row.reference, row.answer)).encode())
        return digest.hexdigest()[:16]

    def notes(self, source: str) -> list[str]:
        """What a reader of the report must know about these rows."""
        notes = []
        if overlong := len(self.left_out):
            notes.append(
                f"{source}: {overlong} of {overlong + len(self.rows)} validation rows are longer than max_length = "
                f"{self.max_length} tokens and were left out."
            )
        if differing := sum(row.boundary_differs for row in self.rows):
            notes.append(
                f"{source}: in {differing} of {len(self.rows)} validation rows the tokenised prompt is not a prefix of the "
                "tokenised row, so the context to generate from differs from the one in training."
            )
        return notes


def tokenize_rows(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    domain: str,
    max_length: int | None = None,
    overlong: Literal["error", "drop"] = "error",
    limit: int | None = None,
    assistant_only_loss: bool | None = None,
) -> EvaluationSet:
    """Tokenise validation rows, see ``tokenize_each``.

    Args:
        source: name of the source, for messages.
        max_length: longest row in tokens; None: any length.
        overlong: what becomes of longer rows; ``drop`` counts them.
        limit: How many rows are used, from the first on.

    Raises:
        UserError: a row that cannot be tokenised or is too long; a set without rows.
    """
    where = f"source {source!r}, validation row"
    every = list(tokenize_each(islice(dataset, limit), tokenizer, where, assistant_only_loss))
    lengths = [len(row.input_ids) for row in every]
    fits = [max_length is None or length <= max_length for length in lengths]
    rows = tuple(row for row, it_fits in zip(every, fits, strict=True) if it_fits)
    left_out = tuple(index for index, it_fits in enumerate(fits) if not it_fits)
    if left_out and overlong == "error":
        raise UserError(
            f"source {source!r}: {len(left_out)} of {len(every)} validation rows are longer than max_length = {max_length} "
            f"tokens (the longest has {max(lengths)}): raise max_length, or leave them out of the evaluation with overlong: "
            "drop."
        )
    if not rows:
        why = f": all {len(left_out)} are longer than max_length = {max_length} tokens" if left_out else ""
        raise UserError(f"source {source!r} has no validation rows to evaluate on{why}.")
    return EvaluationSet(domain, rows, max_length, left_out)
