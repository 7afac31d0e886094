"""The errors that users see without a traceback, and the words that they share."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable
from typing import NamedTuple


class ErrorDetail(NamedTuple):
    """One of the things that are wrong with a file.

    Attributes:
        key: what it is about, as an override names it (``stages.kd.teacher``); empty for the file as a whole.
        reason: what is wrong and what to do.
        place: ``line 3`` or ``override 'seed=x'``; empty where there is none.
    """

    key: str
    reason: str
    place: str


class UserError(ValueError):
    """Something that the user can fix: the message names key, value, reason and remedy.

    The command line prints it without a traceback and exits with status 2. From Python it is a ``ValueError``.

    Attributes:
        details: of a recipe or suite that cannot be loaded: everything that is wrong with it, one by one.
    """

    def __init__(self, message: str, details: Iterable[ErrorDetail] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class Stopped(BaseException):
    """A signal has ended the run; like ``KeyboardInterrupt`` it is no error that a library could handle.

    Args:
        signum: number of the signal; the process exits with ``128 + signum``.
        saved: what is kept of the work that was under way.
    """

    def __init__(self, signum: int, saved: str = "nothing was to be saved") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}; the same command goes on")
        self.status = 128 + signum


def says_disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; safetensors and tokenizers say so in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def says_read_only(error: BaseException) -> bool:
    """Whether an error says that a place may not be written to; safetensors and tokenizers say so in words."""
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return True
    return "os error 13" in str(error) or "os error 30" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says; behind its type where that says more (``KeyError: 'path'``)."""
    line = str(error).strip().split("\n")[0]
    return line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``; did you mean 'X'?`` for the candidate that looks most like ``name``, or nothing when none does."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    # a name that is much longer than all of them is none of them, and comparing it would take minutes
    close = difflib.get_close_matches(name[:200].lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Names for a message: ``a, b and c``, or ``none``."""
    names = list(names)
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"
