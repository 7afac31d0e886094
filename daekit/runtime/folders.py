"""Where a run keeps what: one place that knows the names of its folders and files.

::

    OUTPUT_DIR/
      recipe.yaml           the resolved recipe
      tokenizer/            where the recipe has one of its own
      students/KEY/         students made from their teachers; equal ones once
        student.json        what was made and how
        search.jsonl        every score of the search, search.svg its plot
        model/              the student before its training
      stages/NAME/
        stage_key.json      what the stage's result depends on, written before it begins
        checkpoint-N/       sealed checkpoints
        model/              the result: weights or adapter, tokenizer, recipe.yaml, provenance.json
        stage.json          written last: the stage is complete
      caches/KEY/           what teachers said about the rows, see daekit.teachers.cache
      report/               report.html, report.md, report.json, ...
      suites/NAME/          what a suite of the recipe found
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError


def read_file(path: Path, delete: Path) -> Any:
    """The content of a JSON or YAML file that a run has written.

    Raises:
        UserError: it is damaged; the remedy is to delete ``delete``.
    """
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: this file of the run is damaged. Delete {delete} and run again.")
    return content


@dataclass(frozen=True)
class RunFolder:
    """The output directory of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def tokenizer(self) -> Path:
        """The recipe's own tokenizer."""
        return self.root / "tokenizer"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report"

    def suite(self, name: str) -> Path:
        """The output directory of a suite."""
        return self.root / "suites" / name

    def student(self, key: Mapping[str, Any]) -> StudentFolder:
        """The folder of a student that is made from a teacher, by the facts that it depends on."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return StudentFolder(self.root / "students" / digest)

    def cache(self, key: str) -> Path:
        """The cache of a teacher, by the facts that it depends on."""
        return self.root / "caches" / key

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage."""
        return StageFolder(self.root / "stages" / name)


@dataclass(frozen=True)
class StudentFolder:
    """The folder of a student that is made from its teacher."""

    root: Path

    @property
    def model(self) -> Path:
        """The student; exists when it is complete."""
        return self.root / "model"

    @property
    def facts(self) -> Path:
        """What was made and how."""
        return self.root / "student.json"

    @property
    def log(self) -> Path:
        """Every score of the search."""
        return self.root / "search.jsonl"

    @property
    def plot(self) -> Path:
        """Score against size of every candidate."""
        return self.root / "search.svg"


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage; also the trainer's ``output_dir``."""

    root: Path

    @property
    def key(self) -> Path:
        """What the stage's result depends on."""
        return self.root / "stage_key.json"

    @property
    def model(self) -> Path:
        """The stage's result."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The trained adapter of a stage whose result is merged."""
        return self.root / "adapter"

    @property
    def done(self) -> Path:
        """Exists when the stage is complete."""
        return self.root / "stage.json"

    def read_done(self) -> dict[str, Any] | None:
        """What is known of the complete stage; None if it is not complete."""
        return json.loads(self.done.read_text()) if self.done.is_file() else None
