"""Results of likelihood benchmarks on disk: measured once for the same weights, inputs and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood import Measured
from daekit.files import write_whole


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
        values = {
            (domain, source, metric): RowValues(np.array(total), np.array(weight))
            for domain, source, metric, total, weight in kept["values"]
        }
        rows = [tuple(row) for row in kept["rows"]]
        return Measured(values, [], kept["notes"], kept["generated"], rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and it is measured again") from error


def save_measured(path: Path, key: Mapping[str, Any], measured: Measured) -> None:
    """Keep a result; it is whole or it does not exist. Its items go into a file of their own."""
    values = [[*name, value.total_R.tolist(), value.weight_R.tolist()] for name, value in measured.values.items()]
    kept = {"key": key, "values": values, "notes": measured.notes, "generated": measured.generated, "rows": measured.rows}
    items = path.parent.parent / "items" / f"{path.stem}.jsonl"
    write_whole(items, "".join(json.dumps(item) + "\n" for item in measured.items))
    write_whole(path, json.dumps(kept) + "\n")
