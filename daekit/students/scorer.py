"""Candidates scored without a copy of their weights: views of the sorted teacher run on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.scoring import TokenRow, score_rows
from daekit.protocol import IGNORE_INDEX
from daekit.students.selection import Selection
from daekit.students.slicing import require_plain, view_model


class CandidateScorer:
    """``scorer(selection, tokens)``: nats per token of a student on the first rows that hold so many tokens.

    The student is made of views (``view_model``): beside the teacher a score needs the activations of a batch, and copies of
    only what strides cannot say, which a coarse space does not choose unless it drops query heads within groups.

    Args:
        model: the sorted teacher (``sort_teacher``).
        rows: ``input_ids`` and ``labels`` (-100 where a token does not count).
        vocab_size: the number of ids of the tokenizer.
        by: ``perplexity``: negative log-likelihood of the text; ``kl``: KL(teacher || student), which runs the teacher, too.
        tokens: the most tokens that will be asked for.

    Raises:
        UserError: a family that is not supported, or text with fewer tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[TokenRow],
        *,
        vocab_size: int,
        tokens: int,
        by: Literal["perplexity", "kl"] = "perplexity",
        batch_size: int = 8,
    ) -> None:
        require_plain(model)
        self.model, self.vocab_size, self.by, self.batch_size = model, vocab_size, by, batch_size
        self.rows, self.ends = list(rows), []
        total = 0
        for row in self.rows:
            total += sum(label != IGNORE_INDEX for label in row["labels"][1:])
            self.ends.append(total)
        if total < tokens:
            raise UserError(
                f"calibration text too short: {total} tokens to score in {len(self.rows)} rows, but the last stage of "
                f"the search wants {tokens}; give more text or fewer tokens"
            )

    def __call__(self, selection: Selection, tokens: int) -> float:
        """Nats per token of the selected student; the last row is scored whole."""
        count = next(index for index, end in enumerate(self.ends, start=1) if end >= tokens)
        scores = score_rows(
            view_model(self.model, selection),
            self.rows[:count],
            vocab_size=self.vocab_size,
            batch_size=self.batch_size,
            teacher=self.model if self.by == "kl" else None,
        )
        total = scores.nll_R if scores.kl_R is None else scores.kl_R
        return float(total.sum() / scores.tokens_R.sum())
