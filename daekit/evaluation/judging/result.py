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


@dataclass(frozen=True)
class Missing:
    """Judgments of one model that are not there.

    Attributes:
        unanswered: the judge was not asked, or did not answer.
        unread: its answer holds no verdict that the parser reads.
        total: judgments that there should be.
    """

    unanswered: int
    unread: int
    total: int

    @property
    def count(self) -> int:
        """All that are missing."""
        return self.unanswered + self.unread


def withhold(
    benchmark: str,
    scores: Mapping[str, Sequence[Row]],
    missing: Mapping[str, Missing],
    allow_missing: int,
    stopped: str | None,
) -> tuple[list[Row], list[str], list[str]]:
    """(rows, notes, refusals): the scores of each model unless more than ``allow_missing`` judgments are missing, and always
    how many are."""
    rows: list[Row] = []
    notes, refusals = [], []
    for model, its in scores.items():
        lack = missing[model]
        count = float(lack.count)
        rows.append(Row(model, benchmark, "missing_judgments", count, count, count, lack.total))
        said = (
            f"{benchmark}: {lack.count} of {lack.total} judgments of {model} are missing ({lack.unanswered} without an answer, "
            f"{lack.unread} whose answer holds no verdict)"
        )
        if lack.count > allow_missing:
            why = f" The run ended early: {stopped}." if stopped else ""
            refusals.append(
                f"{said}; its scores are withheld.{why} Run again to send what is missing, or allow it: "
                f"--allow-missing {lack.count}."
            )
            continue
        if lack.count:
            notes.append(f"{said}; its scores are of the others (--allow-missing {allow_missing}).")
        rows += its
    return rows, notes, refusals
