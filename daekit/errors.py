"""The errors that users see without a traceback."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Something that the user can fix: the message names key, value, reason and remedy.

    The command line prints it without a traceback and exits with status 2. From Python it is a ``ValueError``.
    """


def says_disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; safetensors and tokenizers say so in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
