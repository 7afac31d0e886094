"""What a run of a suite has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.judging import Judged
from daekit.evaluation.likelihood import Measured
from daekit.generation import Budget


@dataclass
class Results:
    """Everything that the report is made of.

    Attributes:
        evaluations: model -> its values, row by row.
        measured: (model, benchmark) -> what the benchmark found.
        judged: benchmark -> scores of its judge.
        identities: model -> what its scores depend on.
        notes: Sentences for the report.
        budgets: (place, name) of a judge or an endpoint -> what it was sent so far.
    """

    evaluations: dict[str, ModelEvaluation] = field(default_factory=dict)
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budgets: dict[tuple[str, str], list[Budget]] = field(default_factory=dict)
