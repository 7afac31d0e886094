"""Rows of one domain: from JSONL or Parquet files, directories of them, the hub, or the embedded corpora."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable

from daekit.data.builtin import builtin_rows
from daekit.data.rows import VISION_COLUMNS, RowCollector, take
from daekit.errors import UserError, first_line
from daekit.recipe.generated import PromptsSpec
from daekit.recipe.schema import SourceSpec
from daekit.recipe.validation import DATA_FILES, is_local

BUILTIN = "builtin:"
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf", "Nifti")
_ROWS_PER_READ = 1000
_LONGEST_PATH_SHOWN = 200

_SPLIT_IN_NAME = re.compile(
    r"(?:^|[-._/ ])(train|training|validation|valid|val|dev|eval|evaluation|test|testing)(?=$|[-._/ ]|\d)", re.IGNORECASE
)
_UNREAD = (".csv", ".tsv", ".arrow", ".xlsx", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")  # that may hold rows
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_SPLIT_OF_WORD = {"training": "train", "testing": "test"} | dict.fromkeys(
    ("valid", "val", "dev", "eval", "evaluation"), "validation"
)

# A row and where it is, in the words of an error message.
PlacedRow = tuple[str, Mapping[str, Any]]


def load_source(name: str, spec: SourceSpec, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training and validation rows of a source, checked, in one form, with a ``domain`` column.

    Kept columns are those of `daekit.data.rows`. The rows held out for validation are chosen before ``limit`` applies, so that
    they stay the same under any limit.

    Args:
        name: Name of the source in errors.
        spec: A checked source: of ``holdout``, ``validation`` and ``validation_split`` at most one is set.
        seed: It chooses the rows that ``holdout`` takes.

    Raises:
        UserError: a missing, empty or broken file; a hub data set that cannot be had; a row that is not of the form of
            the others, lacks a column or holds a value of the wrong type (the message names its line or row).
    """
    where = f"sources.{name}"
    if spec.path is None:
        raise UserError(f"{where}: its rows are written by a model before they can be read: `daekit generate RECIPE`")
    rows = _load(where, spec, spec.path, spec.split, "train", None if spec.holdout else spec.limit)
    if spec.validation is not None:
        return rows, _load(where, spec, spec.validation, "validation", "validation", spec.validation_limit)
    if spec.validation_split is not None:
        return rows, _load(where, spec, spec.path, spec.validation_split, "train", spec.validation_limit)
    if not spec.holdout:
        return rows, None
    if spec.holdout >= len(rows):
        raise UserError(f"{where}.holdout: {spec.holdout} rows of {len(rows)} leave none to train on; hold out fewer")
    order = np.random.default_rng(seed).permutation(len(rows))
    train, held_out = np.sort(order[: -spec.holdout]), np.sort(order[-spec.holdout :])
    return take(rows, train[: spec.limit]), take(rows, held_out[: spec.validation_limit])


def load_rows(where: str, spec: SourceSpec, limit: int | None) -> Dataset:
    """The first ``limit`` rows to evaluate on, checked as those of a source; a single file is all of its split.

    Raises:
        UserError: see ``load_source``; the message begins with ``where``.
    """
    assert spec.path is not None
    return _load(where, spec, spec.path, spec.split, spec.split, limit)


def _load(where: str, spec: SourceSpec, path: str, split: str, whole: str, limit: int | None) -> Dataset:
    """Rows of one split. ``whole``: the split that files belong to whose names say nothing."""
    collector = RowCollector(where, spec.columns, spec.chat)
    for place, row in islice(placed_rows(where, spec, path, split, whole), limit):
        collector.add(row, place)
    if not len(collector):
        raise UserError(f"{where}: {path} (split {split}) has no rows")
    return collector.dataset(spec.domain)


def placed_rows(where: str, spec: SourceSpec | PromptsSpec, path: str, split: str, whole: str) -> Iterator[PlacedRow]:
    """The rows of one split with their places, unchecked. ``whole``: the split that files belong to whose names say nothing."""
    if path.startswith(BUILTIN):
        rows = builtin_rows(path.removeprefix(BUILTIN), split)
        return ((f"row {number} of {path}", row) for number, row in enumerate(rows, 1))
    local = Path(path).expanduser()
    if _is_there(where, local):
        return (row for file in _files(where, local, split, whole) for row in _rows_of_file(where, file))
    if is_local(path):
        raise UserError(
            f"{where}: {path} does not exist; give a {', '.join(DATA_FILES)} file, a directory of them, or a hub id"
        )
    return _rows_of_table(where, path, _from_hub(where, spec, path, split))


def _is_there(where: str, path: Path) -> bool:
    """Whether a path exists; one that cannot be looked at, and a link to nothing, is an error and no name on the hub."""
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{where}: {path} is a link to {path.readlink()}, which does not exist; mend the link")
        return path.exists()
    except OSError as error:  # a name of more than 255 bytes, a directory without permission
        text = str(path)
        shown = text if len(text) <= _LONGEST_PATH_SHOWN else f"{text[:_LONGEST_PATH_SHOWN]}..."
        raise UserError(f"{where}: {shown} cannot be opened ({error.strerror}); correct the path") from error


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(where: str, path: Path, split: str, whole: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in DATA_FILES:
            raise UserError(f"{where}: {path} is of no known format; it must end in {', '.join(DATA_FILES)}")
        if split != whole:
            raise UserError(
                f"{where}: {path} is one file and has no split {split!r}; name a file with validation, or use holdout"
            )
        return [path]
    seen = [file for file in sorted(path.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in seen if file.suffix in DATA_FILES and _is_there(where, file) and not file.is_dir()]
    if not files:
        raise UserError(f"{where}: directory {path} holds no file that ends in {', '.join(DATA_FILES)}")
    splits = {file: _split_of(file.relative_to(path)) for file in seen}
    named = {found for file in files if (found := splits[file])}
    unnamed = [file for file in files if not splits[file]]
    if named and unnamed:
        raise UserError(
            f"{where}: in {path} the name of {unnamed[0].name} says no split, others do ({', '.join(sorted(named))}); "
            "name the file instead of the directory"
        )
    mine = {file for file in seen if (splits[file] or (not named and whole)) == split}
    chosen = [file for file in files if file in mine]
    if not chosen:
        has = ", ".join(sorted(named)) or f"{whole} only: no file name tells a split"
        raise UserError(f"{where}: {path} has no split {split!r} (it has {has})")
    others = [file for file in seen if file in mine and file.suffix not in DATA_FILES and file.is_file()]
    unread = [file for file in others if file.name.lower().endswith((*DATA_FILES, *_UNREAD))]
    _require_all_read(where, path, unread, chosen)
    return chosen


def _require_all_read(where: str, path: Path, unread: Sequence[Path], files: Sequence[Path]) -> None:
    """No rows of a split are left out without a word: those in files of other formats, and in shards that are missing."""
    if unread:
        raise UserError(
            f"{where}: {path} also holds {unread[0].relative_to(path)}, which would not be read; convert it (files end in "
            f"{', '.join(DATA_FILES)}), move it elsewhere, or name one file instead of the directory"
        )
    shards: dict[tuple[Path, str, str], set[str]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.stem):
            shards.setdefault((file.parent, found[1], found[3]), set()).add(found[2])
    for (folder, stem, number), have in shards.items():
        if len(have) != int(number):
            reason = f"{folder} holds {len(have)} of the {int(number)} shards {stem}-*-of-{number}"
            raise UserError(f"{where}: {reason}; get the others, or give these other names")


def _split_of(file: Path) -> str | None:
    """The split that a file's path names, by the hub's habits: ``train.jsonl``, ``val-00000-of-00002.parquet``."""
    words = _SPLIT_IN_NAME.findall(file.with_suffix("").as_posix())
    return _SPLIT_OF_WORD.get(words[0].lower(), words[0].lower()) if words else None


def _rows_of_file(where: str, file: Path) -> Iterator[PlacedRow]:
    if file.suffix in _JSON_LINES:
        return json_lines(where, file)
    try:
        table = Dataset(InMemoryTable(pq.read_table(file)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: {file} is not a readable Parquet file ({first_line(error)})") from error
    except (ValueError, TypeError, KeyError) as error:  # a column's type, or a feature in its metadata, that datasets has not
        raise UserError(
            f"{where}: {file} holds a column or metadata that datasets cannot take ({first_line(error)}); leave the column out"
        ) from error
    return _rows_of_table(where, str(file), table)


def json_lines(where: str, file: Path) -> Iterator[PlacedRow]:
    """(place, object) of every line that is not empty; UserError for a file that cannot be read or a line that is no object."""
    try:
        lines = file.open("rb")
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror})") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits is no JSONDecodeError
                raise UserError(f"{where}: {place} is not JSON ({error}); a row is one JSON object on one line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {place} is a {type(row).__name__}; a row is one JSON object on one line")
            yield place, row


# ---- tables ----------------------------------------------------------------------------------------------------------


def _from_hub(where: str, spec: SourceSpec | PromptsSpec, path: str, split: str) -> Dataset:
    try:
        return load_dataset(path, name=spec.name, split=split, revision=spec.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{where}: {path!r} is no file or directory here, and could not be had from the hub ({first_line(error)}); "
            "check the name, its configuration (name), split and revision, your access and the network, or give a local file"
        ) from error


def _rows_of_table(where: str, path: str, table: Dataset) -> Iterator[PlacedRow]:
    for column, feature in table.features.items():
        if column in VISION_COLUMNS or type(feature).__name__ in _MEDIA_FEATURES:
            raise UserError(f"{where}: {path} has a column {column!r} of images or other media; only text can be distilled")
    for start in range(0, len(table), _ROWS_PER_READ):
        try:
            batch = table[start : start + _ROWS_PER_READ]
        except UnicodeDecodeError:
            bad = next(row for row in range(start, len(table)) if not _is_text(table, row))
            raise UserError(f"{where}: row {bad + 1} of {path} holds a text that is not UTF-8; mend or remove it") from None
        except (OverflowError, ValueError) as error:  # a date of the year 10000
            place = f"rows {start + 1} to {min(start + _ROWS_PER_READ, len(table))} of {path}"
            raise UserError(f"{where}: {place} hold a value that Python cannot ({error}); leave its column out") from error
        for number, values in enumerate(zip(*batch.values(), strict=True), start + 1):
            yield f"row {number} of {path}", dict(zip(batch, values, strict=True))


def _is_text(table: Dataset, row: int) -> bool:
    with suppress(UnicodeDecodeError):
        return bool(table[row])
    return False
