"""What a run of a suite has found so far, and results of likelihood benchmarks on disk: measured once for the same weights,
inputs and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daekit.errors import UserError
from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.judging import Judged
from daekit.evaluation.likelihood import Measured
from daekit.files import write_whole
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


def load_measured(path: Path, key: Mapping[str, Any]) -> Measured | None:
    """What was measured under this key; None if nothing was, or under another.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != json.loads(json.dumps(key)):
            return None
        values = {(*name,): RowValues(np.array(total), np.array(weight)) for *name, total, weight in kept["values"]}
        return Measured(values, [], kept["notes"], kept["generated"], [tuple(row) for row in kept["rows"]])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and it is measured again") from error


def save_measured(path: Path, key: Mapping[str, Any], measured: Measured) -> None:
    """Keep a result; it is whole or it does not exist. Its items go into a file of their own."""
    values = [[*name, value.total_R.tolist(), value.weight_R.tolist()] for name, value in measured.values.items()]
    kept = {"key": key, "values": values, "notes": measured.notes, "generated": measured.generated, "rows": measured.rows}
    if measured.items:
        items = path.parent.parent / "items" / f"{path.stem}.jsonl"
        write_whole(items, "".join(json.dumps(item) + "\n" for item in measured.items))
    write_whole(path, json.dumps(kept) + "\n")
