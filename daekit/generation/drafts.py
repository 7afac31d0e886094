"""What a model has written, before it is a row: judged by the filters of its source, counted, kept on disk."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from daekit.errors import UserError
from daekit.files import append_json_lines, damaged_line, read_json_lines
from daekit.recipe.generated import GeneratedSpec

Attempt = Mapping[str, Any]  # ``fate``, ``tokens``, ``differs``; of a kept one ``row``, and ``unfinished`` if it was cut
_WORDS = {
    "open_turn": "user turns without end",
    "empty": "empty",
    "unfinished": "without end",
    "short": "shorter than min_tokens",
    "unmatched": "not matching",
    "duplicate": "duplicates",
    "near_duplicate": "near duplicates",
}
UNFINISHED = "unfinished"  # fate of a draft, column of a kept row
_SHINGLE = 3  # words
_PERMUTATIONS = 128
_MISSED = 0.9  # weight of a near duplicate that is missed; one that is found is looked at exactly


class Draft(NamedTuple):
    """One attempt.

    Attributes:
        row: the training row, if it is to be one.
        text: the answer.
        tokens: number of tokens that were generated.
        fate: ``written``, ``empty``, ``unfinished``, or ``open_turn`` for a user's turn without end.
        differs: whether the text is other tokens than those that were generated, when it is tokenised again.
    """

    row: dict[str, Any] | None
    text: str
    tokens: int
    fate: str
    differs: bool = False


@dataclass
class Counts:
    """What became of the attempts."""

    attempts: int = 0
    tokens: int = 0
    differs: int = 0
    fates: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Rows."""
        return self.fates["kept"]

    def add(self, attempt: Attempt) -> None:
        """Count one more."""
        self.attempts += 1
        self.tokens += attempt["tokens"]
        self.fates[attempt["fate"]] += 1
        self.differs += attempt["fate"] == "kept" and attempt["differs"]

    def __str__(self) -> str:
        lost = [f"{self.fates[fate]:,} {words}" for fate, words in _WORDS.items() if self.fates[fate]]
        differs = [f"{self.differs:,} rows are other tokens when they are tokenised again"] if self.differs else []
        return "; ".join([f"{self.kept:,} rows of {self.attempts:,} attempts", *lost, *differs])

    def facts(self) -> dict[str, Any]:
        """For a file."""
        return {"attempts": self.attempts, "tokens": self.tokens, "tokenised_otherwise": self.differs, **dict(self.fates)}


class Judge:
    """Decides which drafts are rows, by the filters of a source and the rows before."""

    def __init__(self, spec: GeneratedSpec) -> None:
        self._spec = spec
        self._pattern = None if spec.matching is None else re.compile(spec.matching)
        self._rows: set[str] = set()
        self._near = None if spec.near_duplicates is None else NearDuplicates(spec.near_duplicates)

    def __call__(self, draft: Draft) -> Attempt:
        """The attempt, as it is kept on disk; a kept row counts as one before from now on."""
        attempt = {"fate": self._fate(draft), "tokens": draft.tokens, "differs": draft.differs}
        if attempt["fate"] == "kept":
            attempt |= {"row": draft.row} | ({UNFINISHED: True} if draft.fate == UNFINISHED else {})
            self.remember(attempt)
        return attempt

    def remember(self, attempt: Attempt) -> None:
        """Take an attempt for one before, as it was judged."""
        if attempt["fate"] == "kept":
            self._rows.add(_identity(attempt["row"]))
            if self._near is not None:
                self._near.add(_text(attempt["row"]))

    def _fate(self, draft: Draft) -> str:
        if draft.fate != "written" and not (draft.fate == "unfinished" and self._spec.keep_unfinished):
            return draft.fate
        assert draft.row is not None
        if draft.tokens < self._spec.min_tokens:
            return "short"
        if self._pattern is not None and self._pattern.search(draft.text) is None:
            return "unmatched"
        if _identity(draft.row) in self._rows:
            return "duplicate"
        if self._near is not None and _text(draft.row) in self._near:
            return "near_duplicate"
        return "kept"


class NearDuplicates:
    """Texts of which a new one may be nearly one: MinHash finds candidates, the Jaccard index of their shingles decides."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UserError(
                "near_duplicates needs the package datasketch: pip install 'daekit[near-duplicates]', or leave it out"
            ) from error
        self._threshold, self._hash = threshold, MinHash
        self._index = MinHashLSH(threshold, _PERMUTATIONS, weights=(1 - _MISSED, _MISSED))
        self._shingles: list[set[bytes]] = []

    def add(self, text: str) -> None:
        """Remember a text."""
        shingles = _shingles(text)
        self._index.insert(len(self._shingles), self._sketch(shingles))
        self._shingles.append(shingles)

    def __contains__(self, text: str) -> bool:
        shingles = _shingles(text)
        candidates: Iterable[int] = self._index.query(self._sketch(shingles))
        found = (self._shingles[at] for at in candidates)
        return any(len(shingles & other) / len(shingles | other) >= self._threshold for other in found)

    def _sketch(self, shingles: set[bytes]) -> Any:
        sketch = self._hash(_PERMUTATIONS)
        sketch.update_batch(sorted(shingles))
        return sketch


class DraftStore:
    """Attempts on disk, in order, one line per batch: a kill in the middle of a line leaves the batches before it whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.attempts: list[Attempt] = []
        for number, line in enumerate(read_json_lines(path, repair=True)[0], 1):
            if line.get("first") != len(self.attempts):
                raise damaged_line(path, number, "attempts before it are missing")
            self.attempts += line["attempts"]

    def add(self, attempts: list[Attempt]) -> None:
        """Append a batch; it is on the disk when this returns."""
        append_json_lines(self._path, [{"first": len(self.attempts), "attempts": attempts}])
        self.attempts += attempts

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The first kept rows; those whose answer was cut say so (``unfinished``)."""
        kept = [attempt for attempt in self.attempts if attempt["fate"] == "kept"][:count]
        return [attempt["row"] | ({UNFINISHED: True} if attempt.get(UNFINISHED) else {}) for attempt in kept]


def _identity(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _text(row: Mapping[str, Any]) -> str:
    values = [row[column] for column in ("prompt", "completion", "text") if column in row]
    return "\n".join(
        value if isinstance(value, str) else "\n".join(str(message.get("content")) for message in value) for value in values
    )


def _shingles(text: str) -> set[bytes]:
    words = text.lower().split()
    return {" ".join(words[at : at + _SHINGLE]).encode() for at in range(max(len(words) - _SHINGLE + 1, 1))}
