"""The one error that users see without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can fix: the message names key, value, reason and remedy.

    The command line prints it without a traceback and exits with status 2. From Python it is a ``ValueError``.
    """
