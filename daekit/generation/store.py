"""Replies on disk: append-only JSON lines, one writer, the body as it came.

``replies.jsonl`` holds the bodies of answers, which are never asked for again; ``unreadable.jsonl`` bodies in which no answer
could be read; ``errors.jsonl`` says what was given up. The last two are only read by people.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from daekit.errors import UserError
from daekit.files import append_json_lines, damaged_line, read_json_lines
from daekit.generation.calls import ChatReply, read_reply

REPLIES, UNREADABLE, ERRORS, LOCK = "replies.jsonl", "unreadable.jsonl", "errors.jsonl", "calls.lock"


class ReplyStore:
    """The replies in ``folder``, for this process alone.

    Attributes:
        replies: key -> reply.
        was_torn: Whether a torn last line was cut when the store was opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, _lock(folder)
        try:
            self.replies, self.was_torn = _read(folder / REPLIES, repair=True)
            for name in (UNREADABLE, ERRORS):
                read_json_lines(folder / name, repair=True)
        except BaseException:
            self.close()
            raise

    def add(self, key: str, label: str, body: str) -> ChatReply | None:
        """Keep a body, then read it; it is on the disk when this returns. None where it holds no answer."""
        now = time.time()
        reply = read_reply(body, now)
        name = UNREADABLE if reply is None else REPLIES
        append_json_lines(self._folder / name, [{"key": key, "label": label, "time": now, "body": body}])
        if reply is not None:
            self.replies[key] = reply
        return reply

    def add_error(self, key: str, label: str, error: str, attempts: int) -> None:
        """Note a request that was given up; the next run asks it again."""
        entry = {"key": key, "label": label, "time": time.time(), "attempts": attempts, "error": error}
        append_json_lines(self._folder / ERRORS, [entry])

    def close(self) -> None:
        """Let other processes use the folder."""
        os.close(self._lock)


def read_replies(folder: Path) -> dict[str, ChatReply]:
    """The replies in ``folder`` without taking it, for estimates."""
    return _read(folder / REPLIES, repair=False)[0]


def _lock(folder: Path) -> int:
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it however the process ends
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"{folder}: another process is sending calls from this folder; wait for it to end, or use another folder."
        ) from error
    return file


def _read(path: Path, repair: bool) -> tuple[dict[str, ChatReply], bool]:
    """The replies, and whether the last line is torn."""
    entries, torn = read_json_lines(path, repair=repair)
    replies = {}
    for number, entry in enumerate(entries, 1):
        key, body, when = entry.get("key"), entry.get("body"), entry.get("time")
        reply = read_reply(body, when) if isinstance(body, str) and isinstance(when, float) else None
        if reply is None or not isinstance(key, str):
            raise damaged_line(path, number, "it holds no reply")
        replies[key] = reply
    return replies, torn
