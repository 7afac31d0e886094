"""The fingerprint sees what a data set says and nothing of how it is stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from daekit.data.fingerprint import data_fingerprint

MESSAGES = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [{"role": "user", "content": "ç"}]]
ROWS: dict[str, list[Any]] = {
    "messages": MESSAGES,
    "text": ["one", None],
    "n": [1, 2],
    "x": [0.5, None],
    "flag": [True, False],
    "list": [[1, 2], []],
}


def test_storage_does_not_matter(tmp_path: Path) -> None:
    rows = {key: values * 5500 for key, values in ROWS.items()}
    dataset = Dataset.from_dict(rows)
    expected = data_fingerprint(dataset)
    half = len(dataset) // 2
    halves = [dataset.select(range(half)), dataset.select(range(half, len(dataset)))]
    assert data_fingerprint(concatenate_datasets(halves)) == expected
    backwards = list(range(len(dataset)))[::-1]
    assert data_fingerprint(dataset.select(backwards)) != expected
    assert data_fingerprint(dataset.select(backwards).select(backwards)) == expected
    assert data_fingerprint(dataset.select_columns(dataset.column_names[::-1])) == expected
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    assert data_fingerprint(Dataset.load_from_disk(tmp_path / "saved")) == expected
    assert data_fingerprint(dataset.cast_column("text", Value("large_string")).cast_column("n", Value("int16"))) == expected
    sliced = Dataset(pa.concat_tables([dataset.data.table.slice(0, 7), dataset.data.table.slice(7)]))
    assert data_fingerprint(sliced) == expected


def test_another_process_gives_the_same() -> None:
    imports = "from datasets import Dataset; from daekit.data.fingerprint import data_fingerprint"
    code = f"{imports}; print(data_fingerprint(Dataset.from_dict({ROWS!r})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == data_fingerprint(Dataset.from_dict(ROWS))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("text", ["one", ""]),
        ("text", ["onE", None]),
        ("text", [None, "one"]),
        ("n", [1, 3]),
        ("n", ["1", "2"]),
        ("n", [1.0, 2.0]),
        ("x", [0.5, 0.0]),
        ("flag", [True, True]),
        ("flag", [1, 0]),
        ("list", [[1], [2]]),
        ("list", [[1, 2], None]),
        ("messages", [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]),
        ("messages", [[MESSAGES[0][0], MESSAGES[0][1] | {"content": "c"}], MESSAGES[1]]),
        ("messages", [MESSAGES[0], [{"role": "user", "content": None}]]),
    ],
)
def test_any_changed_value_shows(column: str, values: list[Any]) -> None:
    assert data_fingerprint(Dataset.from_dict(ROWS | {column: values})) != data_fingerprint(Dataset.from_dict(ROWS))


def test_neighbours_do_not_run_into_one_another() -> None:
    assert data_fingerprint(Dataset.from_dict({"a": ["ab", "c"]})) != data_fingerprint(Dataset.from_dict({"a": ["a", "bc"]}))
    assert data_fingerprint(Dataset.from_dict({"a": [[1, 2], [3]]})) != data_fingerprint(
        Dataset.from_dict({"a": [[1], [2, 3]]})
    )


def test_a_slice_is_its_rows() -> None:
    """A slice shares the buffers of the whole."""
    texts = [f"row {i}" for i in range(20)]
    whole = Dataset.from_dict({"t": texts, "l": [[i] for i in range(20)]}).cast_column("t", Value("large_string"))
    part = whole.select(range(5, 9))
    assert data_fingerprint(part) == data_fingerprint(Dataset.from_dict({"t": texts[5:9], "l": [[i] for i in range(5, 9)]}))


def test_column_names_count() -> None:
    assert data_fingerprint(Dataset.from_dict({"a": ["x"], "b": ["y"]})) != data_fingerprint(
        Dataset.from_dict({"a": ["y"], "b": ["x"]})
    )
    assert data_fingerprint(Dataset.from_dict({"a": ["x"]})) != data_fingerprint(Dataset.from_dict({"b": ["x"]}))
    assert data_fingerprint(Dataset.from_dict({"a": ["x"]})) != data_fingerprint(Dataset.from_dict({"a": ["x", None]}))


texts = st.lists(st.none() | st.text(max_size=4), max_size=6)


@settings(max_examples=50, deadline=None)
@given(a=texts, b=texts)
def test_equal_only_for_equal_rows(a: list[str | None], b: list[str | None]) -> None:
    """Neighbouring strings must not run into one another, nor nulls into empty strings."""
    make = [Dataset(pa.table({"t": pa.array(values, pa.string())})) for values in (a, b)]
    assert (data_fingerprint(make[0]) == data_fingerprint(make[1])) == (a == b)


def test_json_columns() -> None:
    features = Features({"m": List(Json())})
    one, two = ([[{"a": 1}, {"b": value}]] for value in ("x", "y"))
    first = Dataset.from_dict({"m": one}, features=features)
    assert data_fingerprint(first) == data_fingerprint(Dataset.from_dict({"m": one}, features=features))
    assert data_fingerprint(first) != data_fingerprint(Dataset.from_dict({"m": two}, features=features))
