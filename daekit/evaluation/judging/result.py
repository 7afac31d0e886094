"""What judging a benchmark gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daekit.report.rows import Row


@dataclass(frozen=True)
class Judged:
    """The scores of all models on one benchmark, and everything that a reader must know about them.

    Attributes:
        rows: see the table in ``daekit.evaluation.judging``.
        notes: sentences for the report: parser, comparability, missing judgments that were allowed.
        refusals: one sentence per model whose scores are withheld because judgments are missing; whoever calls should end
            with an error that says them, after writing everything.
        manifest: what makes the scores repeatable; plain values only, no credentials.
        verdicts: one mapping per judgment (model, question, turn, score or verdict, prompt, text of the judge), to show.
    """

    rows: Sequence[Row]
    notes: Sequence[str] = ()
    refusals: Sequence[str] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    verdicts: Sequence[Mapping[str, Any]] = ()
