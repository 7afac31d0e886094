"""The files that the package writes for itself: whole or not at all, and JSON lines of which a kill tears at most the last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from daekit.errors import UserError

_BLOCK = 1 << 22  # bytes read at a time


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash or a power cut all of the new content is there, or all of the old.

    Missing folders are made. A text is written as UTF-8; half a surrogate pair in it becomes ``?``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    with part.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="replace"))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """``write_whole`` of a value as JSON with sorted keys."""
    write_whole(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def file_hash(path: Path, *, sync: bool = False) -> str:
    """XXH3 (128 bits, 32 hexadecimal digits) of every byte of a file: whether it is the same, not whether someone forged it.

    Args:
        sync: bring the file to the disk as well, so that a power cut cannot take away what was hashed.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def facts_hash(facts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of JSON-able facts, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def directory_hashes(directory: Path, endings: tuple[str, ...]) -> dict[str, str] | None:
    """File name -> hash of the files in a directory whose names end so; None where there is no directory (a hub id)."""
    if not directory.is_dir():
        return None
    return {path.name: file_hash(path) for path in sorted(directory.iterdir()) if path.name.endswith(endings)}


def append_json_lines(path: Path, entries: Iterable[Any]) -> None:
    """Append one line per entry; they are on the disk when this returns.

    What a full disk lets through of a line is taken back; a kill in the middle leaves a torn last line, which
    ``read_json_lines`` recognises. Lines are ASCII, so any text can be kept, half a surrogate pair included.
    """
    lines = b"".join(json.dumps(entry, ensure_ascii=True).encode() + b"\n" for entry in entries)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before, rest = os.fstat(file).st_size, lines
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            os.ftruncate(file, before)
            raise
        os.fsync(file)
    finally:
        os.close(file)


def read_json_lines(path: Path, *, repair: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """(the object on every whole line, whether the last line is torn); a missing file has no lines.

    Args:
        repair: cut a torn last line off the file, so that it can be appended to.

    Raises:
        UserError: a whole line is no JSON object.
    """
    if not path.is_file():
        return [], False
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged_line(path, number, str(error)) from None
        if not isinstance(entry, dict):
            raise damaged_line(path, number, f"it is a {type(entry).__name__}, not an object")
        entries.append(entry)
    if repair and whole < len(content):
        os.truncate(path, whole)
    return entries, whole < len(content)


def damaged_line(path: Path, number: int, reason: str) -> UserError:
    """The error for a line of a file of ours that cannot be understood."""
    return UserError(
        f"{path}: line {number} is damaged ({reason}). Delete that line: what it holds is made again, the others are kept."
    )
