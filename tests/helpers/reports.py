"""Reports on disk, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from daekit.report import Row


def rows_of(path: Path) -> list[Row]:
    """The rows of a ``report.json``; what was not finite is None."""
    return [Row(**entry) for entry in json.loads(path.read_text())]
