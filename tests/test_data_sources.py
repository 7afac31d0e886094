"""Loading the rows of a source: forms, splits, limits, and what a user is told about bad data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from daekit.data.builtin import builtin_rows
from daekit.data.fingerprint import data_fingerprint
from daekit.data.rows import form_of
from daekit.data.sources import load_source
from daekit.errors import UserError
from daekit.recipe.schema import SourceSpec

USER, ASSISTANT = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
FORMS = {
    "text": {"text": "a story"},
    "prompt+completion": {"prompt": "two and two?", "completion": "four"},
    "conversation pair": {"prompt": [USER], "completion": [ASSISTANT]},
    "messages": {"messages": [USER, ASSISTANT]},
}


def pairs(count: int, prefix: str = "") -> list[dict[str, Any]]:
    return [{"prompt": f"{prefix}q{i}", "completion": f"a{i}"} for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path | str, seed: int = 0, **fields: Any) -> tuple[Dataset, Dataset | None]:
    return load_source("shop", SourceSpec(domain="ecommerce", path=str(path), **fields), seed)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_from_every_format(tmp_path: Path, suffix: str, form: str) -> None:
    rows = [FORMS[form] | {"category": "x", "answer": "4"} for _ in range(3)]
    train, validation = load(write(tmp_path / f"rows.{suffix}", rows))
    assert form_of(train) == form and validation is None
    assert train.to_list() == [FORMS[form] | {"answer": "4", "domain": "ecommerce"}] * 3


def test_columns_are_renamed_and_choose_the_form(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "prompt": "not this", "reply": "r", "text": "nor this"}])
    train, _ = load(file, columns={"prompt": "question", "completion": "reply"})
    assert train.to_list() == [{"prompt": "q", "completion": "r", "domain": "ecommerce"}]


def test_tool_calls_keep_exactly_their_keys(tmp_path: Path) -> None:
    """Arrow would give every message the keys of all others."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [
        {"messages": [USER, CALL, {"role": "tool", "content": "4", "name": "add"}, ASSISTANT], "tools": tools},
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    for file in (
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "b.jsonl", [rows[0] | {"tools": json.dumps(tools)}, rows[1]]),
    ):
        first, second = load(file)[0].to_list()
        assert first["messages"] == [USER, CALL | {"content": ""}, rows[0]["messages"][2], ASSISTANT]
        assert second["messages"] == [USER, ASSISTANT]
        assert first["tools"] == tools and second["tools"] is None
        assert first["chat_template_kwargs"] == {} and second["chat_template_kwargs"] == {"enable_thinking": False}


# ---- splits and limits -----------------------------------------------------------------------------------------------


def test_a_directory_is_read_by_the_splits_in_its_file_names(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", pairs(3, "a"))
    write(tmp_path / "train-00001-of-00002.parquet", pairs(2, "b"))
    write(tmp_path / "val.jsonl", pairs(1, "v"))
    write(tmp_path / "sub/test/part.jsonl", pairs(4, "t"))
    train, validation = load(tmp_path, validation_split="validation")
    assert validation is not None
    assert train["prompt"][:] == ["aq0", "aq1", "aq2", "bq0", "bq1"] and validation["prompt"][:] == ["vq0"]
    assert len(load(tmp_path, split="test")[0]) == 4


def test_a_directory_without_split_names_is_all_for_training(tmp_path: Path) -> None:
    """A validation split of it would be the training rows again."""
    write(tmp_path / "one.jsonl", pairs(2))
    write(tmp_path / "two.jsonl", pairs(3))
    assert len(load(tmp_path)[0]) == 5
    with pytest.raises(UserError, match="has no split 'validation'"):
        load(tmp_path, validation_split="validation")
    train, validation = load(write(tmp_path / "../more.jsonl", pairs(4)), validation=str(tmp_path))
    assert validation is not None and (len(train), len(validation)) == (4, 5)


def test_a_directory_with_and_without_split_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(2))
    write(tmp_path / "validation.jsonl", pairs(2))
    with pytest.raises(UserError, match=r"rows.jsonl says no split"):
        load(tmp_path)


def test_holdout_parts_the_rows_and_stays_the_same_under_a_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(50))
    train, validation = load(file, holdout=10)
    assert validation is not None and len(validation) == 10
    assert sorted(train["prompt"][:] + validation["prompt"][:]) == sorted(row["prompt"] for row in pairs(50))
    limited, same = load(file, holdout=10, limit=7)
    assert same is not None and same.to_list() == validation.to_list()
    assert limited.to_list() == train.to_list()[:7]
    other = load(file, seed=1, holdout=10)[1]
    assert other is not None and other.to_list() != validation.to_list()
    with pytest.raises(UserError, match="holdout: 50 rows of 50"):
        load(file, holdout=50)


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(9))
    train, validation = load(file, limit=4, validation=str(file), validation_limit=2)
    assert validation is not None
    assert train.to_list()[-1]["prompt"] == "q3" and validation["prompt"][:] == ["q0", "q1"]
    assert len(load(file, limit=100)[0]) == 9


def test_builtin_corpora() -> None:
    train, validation = load("builtin:shop", validation="builtin:shop", limit=20)
    expected = [row | {"domain": "ecommerce"} for row in builtin_rows("shop", "train")[:20]]
    assert train.to_list() == expected
    assert validation is not None and len(validation) == len(builtin_rows("shop", "validation"))
    by_split = load("builtin:shop", validation_split="validation")[1]
    assert by_split is not None and data_fingerprint(by_split) == data_fingerprint(validation)


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = FORMS["prompt+completion"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "line 2 needs .*'completion'.*but has 'prompt'"),
        ({"prompt": "q", "completion": None}, r"line 2 needs .*but has 'prompt' \(and null in 'completion'\)"),
        ({"question": "q", "answer_text": "a"}, "line 2 needs .*but has 'question', 'answer_text'.*columns"),
        ({}, "line 2 needs .*but has no values"),
        ({"prompt": "q", "completion": 4}, "line 2 has int 4 as completion, which must be a string"),
        ({"prompt": "q", "completion": " "}, "line 2 has an empty completion"),
        ({"prompt": "", "completion": "a"}, "line 2 has an empty prompt"),
        ({"prompt": [USER], "completion": "a"}, "line 2 has one of prompt and completion as a list"),
        ({"messages": "hello"}, "line 2 has messages that is str 'hello', not a list"),
        ({"messages": []}, "line 2 has messages that is list"),
        ({"messages": [{"from": "human", "value": "q"}]}, r"line 2 has the keys 'from', 'value' in messages\[0\]"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"line 2 has an empty content in messages\[1\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 2 has a list as content"),
        ({"messages": [USER, {"role": None, "content": "x"}]}, r"line 2 has NoneType None as role of messages\[1\]"),
        ({"text": "a story"}, "line 2 is text, but .*line 1 is prompt.completion"),
        (GOOD | {"text": "t"}, "line 2 has prompt/completion and text; say which"),
        (GOOD | {"answer": 4}, "line 2 has int 4 as answer"),
        (GOOD | {"images": ["a.png"]}, "line 2 has 'images': vision"),
        (GOOD | {"tools": "{"}, "line 2 has tools that are not JSON"),
        (GOOD | {"chat_template_kwargs": [1]}, "line 2 has list .* as chat_template_kwargs"),
        ('{"prompt": "q", "completion": ', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is a list"),
        ('{"prompt": "a \\ud83d b", "completion": "c"}', r"line 2 has '\\ud83d' in prompt, half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', r"line 2 has '\\udfff' in messages\[0\]"),
        ('{"messages": [{"role": "assistant", "tool_calls": ["\\udfff"]}]}', r"line 2 has '\\udfff' in messages\[0\]"),
        ('{"prompt": "q", "completion": "c", "tools": [{"name": "\\udfff"}]}', r"line 2 has '\\udfff' in tools"),
        ('{"prompt": "q", "completion": "c", "n": ' + "1" * 5000 + "}", r"line 2 is not JSON \(Exceeds the limit"),
        ('{"prompt": ' + "[" * 100_000, r"line 2 is not JSON \(.*recursion"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(UserError, match="^sources.shop: .*bad.jsonl, " + message):
        load(file)


def test_lines_are_counted_over_blank_ones_and_every_row_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \n" + json.dumps(GOOD).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match="line 5 is not JSON"):
        load(file)
    assert len(load(file, limit=2)[0]) == 2


def test_a_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [*pairs(1500), {"prompt": "q", "completion": None}])
    with pytest.raises(UserError, match=r"row 1501 of .*a.parquet needs .*null in 'completion'"):
        load(file)
    images = write(tmp_path / "b.parquet", [GOOD | {"image": "bytes"}])
    with pytest.raises(UserError, match="column 'image' of images"):
        load(images)


@pytest.mark.parametrize(
    ("name", "content", "message"),  # the same for every worker of pytest-xdist: each collects by itself and they compare
    [
        ("empty.jsonl", b"\n", "has no rows"),
        ("broken.parquet", b"PAR1 not really", "is not a readable Parquet file"),
        ("rows.csv", b"a,b", "is of no known format"),
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "is of no known format"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)


def test_a_text_of_a_parquet_file_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"fine"] * 1200 + [b"caf\xe9"] + [b"fine"] * 3, pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())  # as other writers leave it
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 1201 of .*a.parquet holds a text that is not UTF-8"):
        load(tmp_path / "a.parquet")


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """In a directory it would otherwise be rows that are left out, alone it would be asked for on the hub."""
    write(tmp_path / "rows" / "a.jsonl", pairs(2))
    (tmp_path / "rows" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for path in (tmp_path / "rows", tmp_path / "rows" / "b.jsonl"):
        with pytest.raises(UserError, match=r"b.jsonl is a link to .*gone.jsonl, which does not exist"):
            load(path)


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sources.shop: .*xxx\.\.\. cannot be opened \(File name too long\)"):
        load(tmp_path / f"{'x' * 300}.jsonl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "./nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"path": "/nowhere/at/all"}, "does not exist"),
        ({"path": "builtin:shops"}, "shops"),
        ({"path": "builtin:shop", "split": "trains"}, "trains"),
        ({"path": "nobody/nothing"}, "'nobody/nothing' is no file or directory here, and could not be had from the hub"),
    ],
)
def test_what_is_not_there(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_source("shop", SourceSpec(domain="d", **fields), 0)


@pytest.mark.parametrize("other", ["b.csv", "c.jsonl.gz", "D.JSONL", "more/e.arrow"])
def test_no_file_of_a_directory_is_left_out_without_a_word(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a.jsonl", pairs(2))
    for beside in ("README.md", "LICENSE", ".hidden.jsonl"):
        (tmp_path / beside).write_text("x")
    assert len(load(tmp_path)[0]) == 2
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("x")
    with pytest.raises(UserError, match=f"also holds {other}, which would not be read; convert it"):
        load(tmp_path)


def test_files_beside_a_split_that_are_none_of_its_rows(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00002.jsonl", ".git/lfs/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, pairs(2))
    for name in ("test.csv", "metadata.csv", ".git/lfs/a.gz", "README.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "LICENSE").symlink_to(tmp_path / "nowhere")
    assert len(load(tmp_path)[0]) == 2
    with pytest.raises(UserError, match=r"also holds train\.csv, which would not be read"):
        (tmp_path / "train.csv").write_text("x")
        load(tmp_path)


def test_a_directory_in_which_a_shard_is_missing(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", pairs(2))
    with pytest.raises(UserError, match=r"holds 2 of the 3 shards train-\*-of-00003; get the others"):
        load(tmp_path)
    write(tmp_path / "train-00001-of-00003.jsonl", pairs(2))
    assert len(load(tmp_path)[0]) == 6


def test_columns_of_a_parquet_file_that_datasets_cannot_take(tmp_path: Path) -> None:
    rows = pa.table({"prompt": ["q"], "completion": ["a"]})
    dated = rows.append_column("at", pa.array([10**15], pa.timestamp("ms")))
    mapped = rows.append_column("m", pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())))
    marked = rows.replace_schema_metadata({"huggingface": '{"info": {"features": {"prompt": {"_type": "Nope"}}}}'})
    for name, table in (("dated", dated), ("mapped", mapped), ("marked", marked)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}.parquet (hold|holds) a .* leave (its|the) column out"):
            load(tmp_path / f"{name}.parquet")


def test_an_empty_directory_and_a_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file"):
        load(tmp_path)
    file = write(tmp_path / "a.jsonl", pairs(3))
    with pytest.raises(UserError, match="is one file and has no split 'test'"):
        load(file, split="test")


def test_chat_frames_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "why?", "completion": "because", "answer": "because"}) + "\n")
    spec = SourceSpec(domain="shop", path=str(file), chat=True)
    row = load_source("shop", spec, seed=0)[0][0]
    assert row["prompt"] == [{"role": "user", "content": "why?"}]
    assert row["completion"] == [{"role": "assistant", "content": "because"}]
    assert row["answer"] == "because"
    assert form_of(load_source("shop", spec, seed=0)[0]) == "conversation pair"


def test_chat_of_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "no answer here"}) + "\n")
    with pytest.raises(UserError, match="chat"):
        load_source("shop", SourceSpec(domain="shop", path=str(file), chat=True), seed=0)
