"""The errors that users see without a traceback."""

from __future__ import annotations

import errno
import signal


class UserError(ValueError):
    """Something that the user can fix: the message names key, value, reason and remedy.

    The command line prints it without a traceback and exits with status 2. From Python it is a ``ValueError``.
    """


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
