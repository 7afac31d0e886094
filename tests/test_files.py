"""Files of daekit's own: whole or as before, and JSON lines that survive a kill, a full disk and any text."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.files import append_json_lines, file_hash, read_json_lines, write_json, write_whole


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"b": 1, "a": 2})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1}
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("daekit.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "something else")
    assert path.read_bytes() == before


def test_the_content_is_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr("daekit.files.os.fsync", lambda file: events.append("fsync") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("rename") or replace(self, to))
    write_whole(tmp_path / "a.txt", b"\x00bytes")
    assert events == ["fsync", "rename"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_lines_that_were_appended_are_read_whatever_the_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    entries = [{"text": text} for text in ("plain", "two\nlines", "half \ud83d", "\u2028", "é" * 9)]
    append_json_lines(path, entries[:2])
    append_json_lines(path, entries[2:])
    assert read_json_lines(path) == (entries, False)
    assert read_json_lines(tmp_path / "none.jsonl") == ([], False)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_recognised_and_cut_only_when_asked(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"at": at, "text": "x" * 9} for at in range(3)])
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    entries, is_torn = read_json_lines(path)
    assert [entry["at"] for entry in entries] == [0, 1] and is_torn and path.read_bytes() == torn
    assert read_json_lines(path, repair=True)[1]
    append_json_lines(path, [{"at": 2}])
    assert [entry["at"] for entry in read_json_lines(path)[0]] == [0, 1, 2]


def test_what_a_full_disk_lets_through_of_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, left = tmp_path / "lines.jsonl", os.write, [30]
    append_json_lines(path, [{"at": 0}])

    def write(file: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: left[0]]
        left[0] -= len(part)
        return real(file, part)

    monkeypatch.setattr("daekit.files.os.write", write)
    with pytest.raises(OSError, match="No space"):
        append_json_lines(path, [{"text": "x" * 100}])
    assert read_json_lines(path) == ([{"at": 0}], False)


@pytest.mark.parametrize("line", ['{"a": ', "[1]", "nonsense", '{"a": ' * 100_000])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_json_lines(path)


def test_the_hash_is_of_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = bytearray(os.urandom(5_000_000))
    path.write_bytes(content)
    before = file_hash(path)
    assert file_hash(path, sync=True) == before
    content[4_500_000] ^= 1
    path.write_bytes(content)
    assert file_hash(path) != before
