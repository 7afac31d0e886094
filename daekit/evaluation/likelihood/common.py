"""What the likelihood benchmarks share: their results, their input files, and what stands before a text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.data.sources import json_lines
from daekit.errors import UserError
from daekit.evaluation.evaluate import Key
from daekit.evaluation.intervals import RowValues
from daekit.files import file_hash, write_whole
from daekit.progress import Progress, ProgressFunction
from daekit.protocol import IGNORE_INDEX
from daekit.recipe.suite import Prefix

TokenRow = dict[str, list[int]]
MetricRow = tuple[str, str, float, float, float, int]  # domain, metric, value, low, high, n


@dataclass
class Measured:
    """What one benchmark found of one model: measured once for the same weights, inputs and settings.

    Attributes:
        values: (domain, source, metric) -> values row by row, as in ``ModelEvaluation``.
        items: a JSON-able record per row, written beside the results.
        notes: what a reader must know, without the model's name.
        generated: source -> generated texts.
        rows: of values that come with intervals of their own.
    """

    values: dict[Key, RowValues] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    generated: dict[str, list[str]] = field(default_factory=dict)
    rows: list[MetricRow] = field(default_factory=list)

    @classmethod
    def once(cls, path: Path, key: Mapping[str, Any], who: str, measure: Callable[[Progress], Measured]) -> Measured:
        """What the file holds under this key, or else what ``measure`` finds, which is kept there; ``who`` begins the lines."""
        found = cls.kept(path, key)
        if found is not None:
            print(f"{who}: measured before, kept", flush=True)
            return found
        start, progress = time.perf_counter(), Progress(who, "rows")
        found = measure(progress)
        progress.close()
        found.keep(path, key)
        print(f"{who}: measured in {time.perf_counter() - start:.1f} s", flush=True)
        return found

    @classmethod
    def kept(cls, path: Path, key: Mapping[str, Any]) -> Measured | None:
        """What was measured under this key, without its items; None if nothing was, or under another.

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
            return cls(values, [], kept["notes"], kept["generated"], [tuple(row) for row in kept["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it, and it is measured again") from error

    def keep(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write it to a file; it is whole or it does not exist. Its items go into a file of their own."""
        values = [[*name, value.total_R.tolist(), value.weight_R.tolist()] for name, value in self.values.items()]
        kept = {"key": key, "values": values, "notes": self.notes, "generated": self.generated, "rows": self.rows}
        if self.items:
            items = path.parent.parent / "items" / f"{path.stem}.jsonl"
            write_whole(items, "".join(json.dumps(item) + "\n" for item in self.items))
        write_whole(path, json.dumps(kept) + "\n")


class Benchmark(Protocol):
    """A benchmark whose input is read and checked; it measures one model after another."""

    data: dict[str, str]
    """What was read -> its hash."""

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """Raise a UserError for what can be known before the weights of model ``name`` are loaded."""

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """Measure a model on the device that it is on; ``progress`` is called with (rows done, all of them)."""


def hash_of(path: Path, where: str) -> str:
    """The hash of a file; UserError if it cannot be read."""
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror})") from error


def lines(path: Path, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, object) of every line of a JSONL file; UserError for a file that cannot be read or a line that is no object."""
    return ((f"{where}: {place}", row) for place, row in json_lines(where, path))


def read_text(path: Path, where: str) -> str:
    """The text of a file; UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # with the line ends that it has
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def text_of(row: Mapping[str, Any], column: str, place: str) -> str:
    """The text in a column; UserError if there is none."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        has = f"it has {', '.join(map(repr, row))}" if column not in row else f"it is {value!r}"
        raise UserError(f"{place}: needs a text in {column!r}, but {has}")
    return value


def prefix_ids(tokenizer: Tokenizer, prefix: Prefix, where: str) -> list[int]:
    """The ids that stand before a text; UserError if the tokenizer has no such token."""
    if prefix == "none":
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = {"auto": eos if bos is None else bos, "bos": bos, "eos": eos}[prefix]
    if found is None:
        raise UserError(f"{where}: prefix={prefix}, but the tokenizer has no such token; choose another, or prefix: none")
    return [found]


def describe_prefix(tokenizer: Tokenizer, prefix: Prefix, where: str) -> str:
    """What stands before a text, in words."""
    ids = prefix_ids(tokenizer, prefix, where)
    if not ids:
        return "nothing stands before a text, and its first token is not scored"
    return f"{tokenizer.convert_ids_to_tokens(ids)[0]} stands before each text, and all its tokens are scored"


def token_row(ids: Sequence[int], start: int) -> TokenRow:
    """A row of which the tokens from ``start`` on are scored."""
    return {"input_ids": list(ids), "labels": [IGNORE_INDEX] * start + list(ids[start:])}


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def require_context(name: str, where: str, longest: int, context_length: int | None, remedy: str) -> None:
    """Raise a UserError if ``longest`` tokens are more than a model is made for."""
    if context_length is not None and longest > context_length:
        raise UserError(
            f"{where}: {longest} tokens are more than the {context_length} that models.{name} is made for; {remedy}"
        )
