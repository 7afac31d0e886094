"""Where a run keeps what: one place that knows the names of its folders and files.

::

    OUTPUT_DIR/
      run.lock              which process writes here, while one does
      recipe.yaml           the resolved recipe
      tokenizer/            where the recipe has one of its own
      students/KEY/         students made from their teachers; equal ones once
        search.jsonl        every score of the search, search.svg its plot
        model/              the student before its training
        student.json        what was made and how; written last: the student is complete
      stages/NAME/
        stage_key.json      what the stage's result depends on; it binds once there is a checkpoint or a result
        preflight.json      how the experts of a dae stage compared with its student
        checkpoint-N/       checkpoints with a manifest
        model/              the result: weights or adapter, tokenizer, recipe.yaml, provenance.json
        adapter/            the trained adapter, where the result is merged
        stage.json          written last: the stage is complete
      generated/NAME-KEY/   rows that a model has written for source NAME
        attempts.jsonl      every attempt; with more rows it goes on
        rows.jsonl          the rows
        source.json         who wrote them, and what became of the attempts; written last: the source is complete
      caches/KEY/           what teachers said about the rows, see daekit.teachers.cache
      report/               report.html, report.md, report.json, ...
        report_key.json     what the report depends on; while it is the same, it is not made again
        measured/KEY.json   what was measured of one model, row by row, by the facts that it depends on
      suites/NAME/          what a suite of the recipe found
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError
from daekit.files import facts_hash, file_hash
from daekit.trainers import checkpoint


def read_file(path: Path, delete: Path | None = None) -> Any:
    """The content of a JSON or YAML file that a run has written.

    Raises:
        UserError: it is damaged; the remedy is to delete ``delete``, by default the file.
    """
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: this file of the run is damaged. Delete {delete or path} and run again.")
    return content


def files_of(root: Path, folders: Sequence[Path]) -> dict[str, list[Any]]:
    """The files of a result, for ``lost`` to compare: path -> size in bytes and, of weights, the hash of the content."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): [path.stat().st_size, _digest(path)] for path in files}


def lost(root: Path, facts: Path) -> str | None:
    """The first file of a complete result that is not there any more; None if all are.

    Args:
        facts: the JSON file that declares the result complete and lists its files.

    Raises:
        UserError: weights have another content than they were written with, or ``facts`` is damaged.
    """
    files = read_file(facts).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{facts}: lists no files, so the result beside it cannot be checked. Delete {facts} and run again.")
    for name, (size, digest) in files.items():
        path = root / name
        if not path.is_file():
            return name
        if digest is not None and (path.stat().st_size != size or _digest(path) != digest):
            raise UserError(
                f"{path}: its content has changed since the run has written it. Put it back, or delete {path.parent}: the run "
                "makes it again from its last checkpoint."
            )
    return None


def _digest(path: Path) -> str | None:
    """Of weights only: other files of a result may be edited."""
    return file_hash(path) if path.suffix == ".safetensors" else None


class RunFolder:
    """The output directory of a run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe, self.tokenizer = self.root / "recipe.yaml", self.root / "tokenizer"
        self.report = self.root / "report"

    @property
    def is_begun(self) -> bool:
        """Whether anything is kept here that a run of another recipe would mix with its own."""
        stages, students = self.root / "stages", self.root / "students"
        return any(StageFolder(each).is_begun for each in stages.glob("*")) or any(students.glob("*/student.json"))

    def suite(self, name: str) -> Path:
        """The output directory of a suite."""
        return self.root / "suites" / name

    def student(self, key: Mapping[str, Any]) -> StudentFolder:
        """The folder of a student that is made from a teacher, by the facts that it depends on."""
        return StudentFolder(self.root / "students" / facts_hash(key)[:12])

    def generated(self, name: str, key: Mapping[str, Any]) -> Path:
        """The rows that a model writes for a source, by the facts that they depend on."""
        return self.root / "generated" / f"{name}-{facts_hash(key)[:12]}"

    def cache(self, key: str) -> Path:
        """The cache of a teacher, by the facts that it depends on."""
        return self.root / "caches" / key

    def measured(self, key: Mapping[str, Any]) -> Path:
        """What the report has measured of a model, by the facts that it depends on."""
        return self.report / "measured" / f"{facts_hash(key)[:12]}.json"

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage."""
        return StageFolder(self.root / "stages" / name)

    def first_missing(self, stages: Iterable[str]) -> str | None:
        """The first of some stages that is not complete; None if all are."""
        return next((name for name in stages if not self.stage(name).done.is_file()), None)


class StudentFolder:
    """The folder of a student that is made from its teacher."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, root / "model"
        self.facts = root / "student.json"  # exists when the student is complete
        self.log, self.plot = root / "search.jsonl", root / "search.svg"

    @property
    def is_complete(self) -> bool:
        """Whether the student lies here whole; its weights are hashed."""
        return self.facts.is_file() and lost(self.root, self.facts) is None


class StageFolder:
    """The folder of one stage; also the trainer's ``output_dir``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.key, self.preflight = root / "stage_key.json", root / "preflight.json"
        self.model, self.adapter = root / "model", root / "adapter"
        self.done = root / "stage.json"  # exists when the stage is complete

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints whose save has ended, the lowest step first."""
        return [folder for folder in checkpoint.checkpoints(self.root) if checkpoint.is_committed(folder)]

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on from: only then the stage's key binds."""
        return self.done.is_file() or bool(self.checkpoints)

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step.

        Raises:
            UserError: it is not there, or damaged.
        """
        folder = self.root / f"checkpoint-{step}"
        if folder not in self.checkpoints:
            there = ", ".join(each.name for each in self.checkpoints) or "none"
            raise UserError(
                f"stage:{self.root.name}@{folder.name}: there is no such checkpoint (there are: {there}). Name another, or set "
                "save_steps and save_total_limit so that it is saved and kept."
            )
        if damage := checkpoint.corruption(folder):
            raise UserError(f"stage:{self.root.name}@{folder.name}: is damaged ({damage}). Name another checkpoint.")
        return folder
