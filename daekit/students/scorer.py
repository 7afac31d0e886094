"""Scores candidates on calibration text, as views of the sorted teacher without copies of weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.scoring import TokenRow, score_rows
from daekit.protocol import IGNORE_INDEX, Batch, FeatureSpec, TeacherOutput
from daekit.students.selection import Selection
from daekit.students.slicing import require_plain, view_model
from daekit.teachers import ModelTeacher


class CandidateScorer:
    """``scorer(selection, tokens)`` is the nats per token of a student on the first rows that hold this many tokens.

    The student consists of views (``view_model``): beside the teacher, a score needs the activations of a batch, and copies
    only where strides cannot express what is kept: in a coarse space, where query heads within groups are dropped.

    For KL the teacher runs once over the text, and its last hidden states are kept: 4 bytes x hidden size per token in 32 bits.

    Args:
        model: The sorted teacher (``sort_teacher``).
        rows: ``input_ids`` and ``labels`` (-100 where a token does not count).
        vocab_size: Number of ids of the tokenizer.
        objective: ``perplexity``: negative log-likelihood of the text; ``kl``: KL(teacher || student).
        tokens: The largest number of tokens that will be asked for.

    Raises:
        UserError: The family is not supported, or the text has fewer tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[TokenRow],
        *,
        vocab_size: int,
        tokens: int,
        objective: Literal["perplexity", "kl"] = "perplexity",
        batch_size: int = 8,
    ) -> None:
        require_plain(model)
        teacher = _RunOnce(model, vocab_size) if objective == "kl" else None
        self.model, self.rows = model, rows
        self.score = partial(score_rows, vocab_size=vocab_size, batch_size=batch_size, teacher=teacher)
        scored = (sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in rows)
        self.ends = list(accumulate(scored, initial=0))  # tokens of the first 0, 1, 2... rows
        if self.ends[-1] < tokens:
            raise UserError(
                f"calibration text too short: {self.ends[-1]} tokens to score in {len(rows)} rows, but the last round of "
                f"the search wants {tokens}; give more text or fewer tokens"
            )

    def __call__(self, selection: Selection, tokens: int) -> float:
        """Nats per token of the selected student; the last row is scored whole."""
        scores = self.score(view_model(self.model, selection), self.rows[: bisect_left(self.ends, tokens)])
        total = scores.nll_R if scores.kl_R is None else scores.kl_R
        return float(total.sum() / scores.tokens_R.sum())


class _RunOnce(ModelTeacher):
    """A teacher that runs once on each batch, because every candidate is compared with it on the same batches."""

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        super().__init__(model, vocab_size)
        self.known: dict[tuple[int, ...], list[TeacherOutput]] = {}

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        key = (*batch.inputs["input_ids"].flatten().tolist(), *batch.labels_BT.flatten().tolist())
        if key not in self.known:
            self.known[key] = super().outputs(batch)
        return self.known[key]
