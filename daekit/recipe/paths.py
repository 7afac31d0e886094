"""Names and paths that a recipe or a suite may hold, checked before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from daekit.errors import listed, nearest
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors, dotted

DATA_FILES = (".jsonl", ".json", ".ndjson", ".parquet")
_NAME = re.compile(r"[\w-]+")
_DOTTED_NAME = re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 100  # bytes; a file system takes 255, and checkpoints, shards and temporary files add to it


def is_name(name: str, dots: bool = False) -> bool:
    """Whether it may be a name (of a model or benchmark of a suite with ``dots``), whatever its length."""
    return bool((_DOTTED_NAME if dots else _NAME).fullmatch(name))


def check_name(name: str, path: Path, errors: Errors, what: str = "name", dots: bool = False) -> None:
    """A name becomes a folder, a metric and a key of overrides."""
    if not is_name(name, dots):
        allowed = (
            "letters, digits, `_`, `-` and `.` only, and begin with no dot" if dots else "letters, digits, `_` and `-` only"
        )
        errors.add_check(
            path, f"the {what} {name[:200]!r} may hold {allowed} (it becomes a folder, a metric and a key of overrides)"
        )
    elif len(os.fsencode(name)) > _LONGEST_NAME:
        errors.add_check(path, f"the {what} {name[:20]!r}... is {len(name)} characters long; use at most {_LONGEST_NAME} bytes")


def exists(path: str) -> bool:
    """Whether a path leads to something; one that cannot be a path does not."""
    return os.path.exists(os.path.expanduser(path))


def looks_local(path: str, suffixes: tuple[str, ...] = DATA_FILES) -> bool:
    """Whether this is meant as a path, and not as a hub id (``name`` or ``owner/name``)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(suffixes)


def check_exists(
    value: str | None, path: Path, errors: Errors, local: bool = False, suffixes: tuple[str, ...] = DATA_FILES
) -> None:
    """A path that can only be a local one must exist; others may be hub ids, which are not looked up.

    Args:
        value: the path.
        path: the key that names it.
        errors: take what is wrong.
        local: whether it cannot be a hub id.
        suffixes: ends of the names of files that no hub id has.
    """
    if value == "":
        errors.add_check(path, "must not be empty")
    elif value is not None and (local or looks_local(value, suffixes)) and not exists(value):
        message = f"{value[:200]!r} does not exist; correct it, or set it on the command line: {dotted(path)}=..."
        errors.add_check(path, message)


def check_output_dir(output_dir: str, path: Path, errors: Errors) -> None:
    """A directory that can be made: nothing on the way is a file, no part of it is longer than file systems take."""
    whole = os.path.expanduser(output_dir)
    if "\0" in whole or any(len(os.fsencode(part)) > 255 for part in whole.split("/")):
        errors.add_check(path, f"{whole[:80]!r} cannot be the name of a directory; choose another")
        return
    while whole and not os.path.lexists(whole):
        whole = os.path.dirname(whole)
    if whole and not os.path.isdir(whole):
        what = "leads nowhere (a broken link)" if os.path.islink(whole) and not os.path.exists(whole) else "is a file"
        errors.add_check(path, f"{whole!r} {what}, not a directory; choose another")


def check_known(names: Iterable[str], known: Iterable[str] | None, noun: str, path: Path, errors: Errors) -> None:
    """Each of ``names`` must be one of ``known`` (None: nobody knows)."""
    if known is None:
        return
    known = list(known)
    for name in names:
        if name not in known:
            errors.add_check(path, f"there is no {noun} {name!r} (there are: {listed(known)}){nearest(name, known)}")
