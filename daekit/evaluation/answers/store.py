"""Answers on disk, in FastChat's format, one line per conversation; what is there is not asked again."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.evaluation.answers.conversations import Answer
from daekit.files import append_json_lines, damaged_line, read_json_lines, write_json

Record = dict[str, Any]


class AnswerStore:
    """``<folder>/<model>.jsonl``, and beside it ``<model>.json`` with what its answers depend on.

    A process that is killed leaves at most one torn line, which is cut when the store is opened next.

    Args:
        facts: JSON-able; equal facts, equal answers.
        write: whether files may be made and cut; without it only what is there is read.

    Raises:
        UserError: the file holds answers of another model, of other questions or settings; a damaged line.
    """

    def __init__(self, folder: Path, model: str, facts: Mapping[str, Any], write: bool = True) -> None:
        self.path, self.model, self._write = folder / f"{model}.jsonl", model, write
        self._claim(folder / f"{model}.json", json.loads(json.dumps(facts)))
        self.records = {record["question_id"]: record for record in self._read()}

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers; they are on the disk when this returns."""
        records = [self._record(answer) for answer in answers]
        append_json_lines(self.path, records)
        self.records |= {record["question_id"]: record for record in records}

    def cut(self) -> int:
        """How many turns ended only because no more tokens were allowed."""
        return sum(record["choices"][0]["finish_reasons"].count("length") for record in self.records.values())

    def _record(self, answer: Answer) -> Record:
        reasons = ["length" if cut else "stop" for cut in answer.cut]
        return {
            "question_id": answer.id,
            "answer_id": uuid.uuid4().hex,
            "model_id": self.model,
            "choices": [{"index": 0, "turns": list(answer.turns), "finish_reasons": reasons}],
            "tstamp": time.time(),
        }

    def _claim(self, path: Path, facts: Any) -> None:
        if path.is_file() and self.path.is_file():
            theirs = self._facts(path)
            if theirs == facts:
                return
            changed = ", ".join(key for key in sorted({*theirs, *facts}) if theirs.get(key) != facts.get(key))
            raise UserError(
                f"{self.path}: holds answers of another run (its {changed} differ). Give the model another name, choose "
                f"another "
                f"output_dir, or delete {self.path}."
            )
        if self._write:
            write_json(path, facts)

    def _facts(self, path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({error}), so that nothing says what the answers in {self.path} depend on; delete both, and "
                "the questions are answered again"
            ) from None

    def _read(self) -> list[Record]:
        records, _ = read_json_lines(self.path, repair=self._write)
        for number, record in enumerate(records, 1):
            try:
                record["question_id"], record["choices"][0]["finish_reasons"]
            except (KeyError, TypeError, IndexError) as error:
                raise damaged_line(self.path, number, f"it is no answer: {error}") from None
        return records
