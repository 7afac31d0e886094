"""Replies of a judge on disk: append-only JSON lines, one writer, whole lines only.

``replies.jsonl`` holds successes, which are never asked again; ``errors.jsonl`` says what failed and is only read by people.
A process that is killed leaves at most one torn last line, which is cut when the folder is opened next.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.evaluation.judging.calls import JudgeReply

REPLIES, ERRORS, LOCK = "replies.jsonl", "errors.jsonl", "calls.lock"


class ReplyStore:
    """The replies in ``folder``, for this process alone.

    Attributes:
        replies: key -> reply.
        cut: whether a torn last line was cut when the store was opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._files: list[int] = []
        try:
            self.replies, whole, size = _read(folder / REPLIES)
            self.cut = whole < size
            if self.cut:
                os.truncate(folder / REPLIES, whole)
            _cut_torn_line(folder / ERRORS)
            self._replies_file, self._errors_file = (self._open(folder / name) for name in (REPLIES, ERRORS))
        except BaseException:
            self.close()
            raise

    def add(self, key: str, label: str, reply: JudgeReply) -> None:
        """Keep a reply; it is on the disk when this returns."""
        line = {"key": key, "label": label, "time": reply.time, "text": reply.text, "response": reply.response}
        _append(self._replies_file, line)
        self.replies[key] = reply

    def add_error(self, key: str, label: str, error: str, attempts: int) -> None:
        """Note a request that was given up; it is asked again by the next run."""
        _append(self._errors_file, {"key": key, "label": label, "time": time.time(), "attempts": attempts, "error": error})

    def close(self) -> None:
        """Let other processes use the folder."""
        for file in (*self._files, self._lock):
            os.close(file)
        self._files = []

    def _open(self, path: Path) -> int:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._files.append(file)
        return file


def read_replies(folder: Path) -> dict[str, JudgeReply]:
    """The replies in ``folder`` without taking it, for estimates."""
    return _read(folder / REPLIES)[0]


def _lock(folder: Path) -> int:
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it however the process ends
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"{folder}: another process is sending judge calls from this folder; wait for it to end, or use another folder."
        ) from error
    return file


def _read(path: Path) -> tuple[dict[str, JudgeReply], int, int]:
    """Replies, the bytes that whole lines take, and all bytes."""
    if not path.exists():
        return {}, 0, 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    replies = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            replies[entry["key"]] = JudgeReply(entry["text"], entry["response"], entry["time"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}). Delete that line: its call is sent again, the others are kept."
            ) from error
    return replies, whole, len(content)


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _append(file: int, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]
    os.fsync(file)
