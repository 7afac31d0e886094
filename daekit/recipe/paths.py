"""Names and paths that a recipe or a suite may hold, checked before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from daekit.errors import listed, nearest
from daekit.recipe.reading import Key, Problems

DATA_FILES = (".jsonl", ".json", ".ndjson", ".parquet")
_NAME, _DOTTED_NAME = re.compile(r"[\w-]+"), re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 100  # bytes; a file system takes 255, and checkpoints, shards and temporary files add to it


def is_name(name: str, dots: bool = False) -> bool:
    """Whether it may be a name (of a model or benchmark of a suite with ``dots``), whatever its length."""
    return bool((_DOTTED_NAME if dots else _NAME).fullmatch(name))


def bad_name(key: Key, name: str | None, what: str = "name", dots: bool = False) -> Problems:
    """A name becomes a folder, a metric and a key of overrides."""
    if name is not None and not is_name(name, dots):
        allowed = (
            "letters, digits, `_`, `-` and `.` only, and begin with no dot" if dots else "letters, digits, `_` and `-` only"
        )
        yield key, f"the {what} {name[:200]!r} may hold {allowed} (it becomes a folder, a metric and a key of overrides)"
    elif name is not None and len(os.fsencode(name)) > _LONGEST_NAME:
        yield key, f"the {what} {name[:20]!r}... is {len(name)} characters long; use at most {_LONGEST_NAME} bytes"


def missing(key: Key, path: str | None, local: bool = False, suffixes: tuple[str, ...] = DATA_FILES) -> Problems:
    """A path that can only be a local one must exist; others may be hub ids (``name``, ``owner/name``), which nobody looks up.

    Args:
        key: that names it.
        path: the path.
        local: whether it cannot be a hub id.
        suffixes: ends of the names of files that no hub id has.
    """
    if path == "":
        yield key, "must not be empty"
    elif path is not None and (local or path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(suffixes)):
        found = os.path.exists(os.path.expanduser(path))
        yield from (
            () if found else [(key, f"{path[:200]!r} does not exist; correct it, or override this key on the command line")]
        )


def bad_directory(key: Key, path: str | None) -> Problems:
    """A directory that can be made: nothing on the way is a file, no part of it is longer than file systems take."""
    whole = os.path.expanduser(path or "")
    if "\0" in whole or any(len(os.fsencode(part)) > 255 for part in whole.split("/")):
        yield key, f"{whole[:80]!r} cannot be the name of a directory; choose another"
        return
    while whole and not os.path.lexists(whole):
        whole = os.path.dirname(whole)
    if whole and not os.path.isdir(whole):
        what = "is a file" if os.path.exists(whole) else "leads nowhere (a broken link)"
        yield key, f"{whole!r} {what}, not a directory; choose another"


def unknown(key: Key, names: Iterable[str], known: Iterable[str] | None, noun: str) -> Problems:
    """Each of ``names`` must be one of ``known`` (None: nobody knows)."""
    known = None if known is None else list(known)
    for name in names:
        if known is not None and name not in known:
            yield key, f"there is no {noun} {name!r} (there are: {listed(known)}){nearest(name, known)}"
