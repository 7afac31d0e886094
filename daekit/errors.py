"""The errors that users see without a traceback, and the words that they share."""

from __future__ import annotations

import difflib
import errno
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


def says_disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; safetensors and tokenizers say so in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


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
