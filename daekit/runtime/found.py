"""Errors of the things that a run needs, gathered to be told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from daekit.errors import ErrorDetail, UserError

_KEY = re.compile(r"((?:sources|stages|tokenizer|evaluation)\b[\w.-]*|output_dir): (.*)", re.DOTALL)  # of a message


@contextmanager
def naming(key: str, *also: type[Exception]) -> Iterator[None]:
    """Make of what the libraries say of options, or of a package that is not installed, an error of the user at ``key``.

    ``also``: further kinds of errors that say so.
    """
    errors: tuple[type[Exception], ...] = (ValueError, TypeError, ImportError, *also)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{key}: {' '.join(str(error).split())}") from error


class Found:
    """Collects errors, so that they are told at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._details: dict[ErrorDetail, None] = {}

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Note what the block raises, at ``key``; the block ends there."""
        try:
            with naming(key):
                yield
        except UserError as error:
            named = _KEY.match(str(error))  # it names its key itself, or not
            detail = ErrorDetail(named[1], named[2], "") if named else _below(key, str(error))
            self._details.setdefault(detail)

    def __len__(self) -> int:
        return len(self._details)

    def raise_if_any(self) -> None:
        """Raises: UserError: one message with everything that was found."""
        lines = [f"{detail.key}: {detail.reason}" for detail in self._details]
        if lines:
            many = [f"{self._name}: {len(lines)} errors", *lines]
            raise UserError(lines[0] if len(lines) == 1 else "\n  ".join(many), self._details)


def _below(key: str, message: str) -> ErrorDetail:
    """What a message says of ``key``, or, where it begins with the last part of that and goes on, of a key below it."""
    named = re.match(rf"{re.escape(key.rpartition('.')[2])}(\.[\w.-]+): (.*)", message, re.DOTALL)
    return ErrorDetail(key + named[1], named[2], "") if named else ErrorDetail(key, message, "")
