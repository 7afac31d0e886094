"""Everything that is wrong with a file, gathered to be told at once, each with its key and its line or override."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import ValidationError

from daekit.errors import ErrorDetail, UserError, listed, nearest
from daekit.recipe.tree import KeyPath, Node, Place, read_tree

Key: TypeAlias = str | KeyPath  # of a mapping, or the keys on the way to something below it
Problems: TypeAlias = Iterator[tuple[Key, str]]  # (key, sentence) of what is wrong with a mapping

_NOUNS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list (of one, if need be: [...])",
    "list_type": "a list (of one, if need be: [...])",
    "dict_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def dotted(path: KeyPath) -> str:
    """A key path as users write it in an override: ``stages.kd.teacher.ensemble.0.weight``."""
    return ".".join(str(part) for part in path)


def _plain(bound: float) -> float:
    return int(bound) if float(bound).is_integer() else bound


@dataclass
class Errors:
    """Everything that is wrong with one file.

    Attributes:
        name: the file's name, the first words of the message.
        root: the tree in which places are looked up.
        paths: key paths of the mappings and fields that are being read, the innermost last.
        copies: key path of a value -> that of the named model that stands in its place; what is wrong with it is told there.
    """

    name: str
    root: Node = field(default_factory=lambda: Node(None, Place()))
    found: list[tuple[Place, KeyPath, str]] = field(default_factory=list)
    paths: list[KeyPath] = field(default_factory=list)
    copies: dict[KeyPath, KeyPath] = field(default_factory=dict)
    _unread: set[KeyPath] = field(default_factory=set)

    def add(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        """Note an error at ``path``; its place is that of the nearest key that exists unless given."""
        self.found.append((self.root.locate(path).place if place is None else place, path, message))

    def add_unread(self, path: KeyPath, message: str, place: Place | None = None) -> None:
        """Like ``add``, for a value that cannot be read: what is found later at the same keys would only follow from it."""
        if not self.is_unread(path):
            self._unread.add(path)
            self.add(path, message, place)

    def add_check(self, path: KeyPath, message: str) -> None:
        """Like ``add``, unless something at, above or below ``path`` could not be read."""
        if not self.is_unread(path, below=True):
            self.add(path, message)

    def add_all(self, problems: Iterable[tuple[Key, str]], above: KeyPath = ()) -> None:
        """``add_check`` of each (key below ``above``, message)."""
        for key, message in problems:
            self.add_check((*above, *((key,) if isinstance(key, str) else key)), message)

    def is_unread(self, path: KeyPath, below: bool = False) -> bool:
        """Whether the value at ``path``, or one that holds it (or lies ``below`` it), is known not to be readable."""
        return any(path[: len(other)] == other or (below and other[: len(path)] == path) for other in self._unread)

    def read(self, text: str, path: KeyPath = (), override: str | None = None, file: str | None = None) -> Node:
        """The tree of a YAML document that lies at ``path``; what in it cannot be read is noted.

        Raises:
            UserError: see ``read_tree``.
        """
        name = self.name if path == () else file or "its value"
        return read_tree(text, name, self.add_unread, path, override, file)

    def add_validation(
        self, path: KeyPath, error: ValidationError, choices: tuple[str, ...] = (), value: object = None
    ) -> None:
        """Note what pydantic says of the value at ``path``.

        Args:
            path: key path of the field.
            error: its ``loc`` names members of unions, too, which no file has.
            choices: the values that the field might have, if pydantic does not know all of them.
            value: what was read; the items of a list that no file holds (the weights of a mixture) know where they lie.
        """
        items = value if isinstance(value, list) else []
        wanted: dict[KeyPath, list[str]] = {}
        for each in error.errors(include_url=False, include_input=False):
            where, node, parts = path, self.root.locate(path), each["loc"]
            if parts and isinstance(parts[0], int) and parts[0] < len(items) and isinstance(items[parts[0]], Node):
                where, node, parts = items[parts[0]].path, items[parts[0]], parts[1:]
            for part in parts:
                below = node.child(part)
                if below is not None:
                    where, node = (*where, part), below
            context, kind = each.get("ctx", {}), each["type"]
            if kind in _NOUNS:
                wanted.setdefault(where, []).append(_NOUNS[kind])
            elif kind == "literal_error":
                allowed = choices or tuple(re.findall(r"'([^']*)'", str(context["expected"])))
                key = str(each["loc"][-2]) if each["loc"][-1:] == ("[key]",) else None
                text = key if key is not None else node.text if node.text is not None else node.value
                hint = nearest(text, allowed) if isinstance(text, str) else ""
                start = "unknown key; it must be" if key is not None else f"{node.show()} is not"
                self.add_unread(where, f"{start} one of {', '.join(allowed)}{hint}")
            elif kind in ("string_too_short", "too_short"):
                self.add_unread(where, "must not be empty")
            elif kind in _BOUNDS:
                bounds = {name: _plain(bound) for name, bound in context.items()}
                bound = "must not be negative" if bounds.get("ge") == 0 else _BOUNDS[kind].format(**bounds)
                self.add_unread(where, f"{node.show()} {bound}")
            else:
                self.add_unread(where, str(context.get("error") or each["msg"]))
        for where, nouns in wanted.items():
            if not any(other[: len(where)] == where and other != where for other in wanted):  # the other member got further
                nouns = nouns if len(nouns) == 1 else [noun.partition(" (")[0] for noun in nouns]
                self.add_unread(where, f"wants {' or '.join(nouns)}, not {self.root.locate(where).show()}")
        if items:
            self._unread.add(path)

    def _originals(self, path: KeyPath) -> list[KeyPath]:
        """The keys of named models whose copy lies at ``path`` or above it, continued to what lies there."""
        return [(*named, *path[len(copy) :]) for copy, named in self.copies.items() if path[: len(copy)] == copy]

    def raise_if_any(self) -> None:
        """Raises: UserError: one message with every error, in the order of the file, overrides last."""
        if not self.found:
            return
        told = {(path, message) for _, path, message in self.found}
        once = [each for each in self.found if not any((path, each[2]) in told for path in self._originals(each[1]))]
        ordered = sorted(once, key=lambda each: (each[0].override is not None, each[0].file or "", each[0].line or 0))
        lines = [f"  {place}{dotted(path)}{': ' if path else ''}{message}" for place, path, message in ordered]
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        details = [ErrorDetail(dotted(path), message, str(place).rstrip(": ")) for place, path, message in ordered]
        raise UserError("\n".join([f"{self.name}: {count}", *lines]), details)


# ---- names and paths, before anything is opened ----------------------------------------------------------------------

DATA_FILES = (".jsonl", ".json", ".ndjson", ".parquet")
BUILTIN_CORPORA = ("skills", "chat", "shop")  # the embedded corpora that ``path: builtin:NAME`` may name
_NAME, _DOTTED_NAME = re.compile(r"[\w-]+"), re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 100  # bytes; a file system takes 255, and checkpoints, shards and temporary files add to it


def is_name(name: str, dots: bool = False) -> bool:
    """Whether it may be a name (of a model or benchmark of a suite with ``dots``), whatever its length."""
    return bool((_DOTTED_NAME if dots else _NAME).fullmatch(name))


def bad_name(key: Key, name: str | None, what: str = "name", dots: bool = False) -> Problems:
    """A name becomes a folder, a metric and a key of overrides."""
    if name is not None and not is_name(name, dots):
        allowed = "letters, digits, `_`, `-` and `.` only, no dot first" if dots else "letters, digits, `_` and `-` only"
        yield key, f"the {what} {name[:200]!r} may hold {allowed} (it becomes a folder, a metric and a key of overrides)"
    elif name is not None and len(os.fsencode(name)) > _LONGEST_NAME:
        yield key, f"the {what} {name[:20]!r}... is {len(name)} characters long; use at most {_LONGEST_NAME} bytes"


def is_local(path: str, suffixes: tuple[str, ...] = DATA_FILES) -> bool:
    """Whether this is meant as a path, and not as a hub id (``name``, ``owner/name``); ``suffixes``: ends that none has."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(suffixes)


def missing(key: Key, path: str | None, local: bool = False, suffixes: tuple[str, ...] = DATA_FILES) -> Problems:
    """A path that can only be a local one must exist; others may be hub ids (``name``, ``owner/name``), which nobody looks up.

    Args:
        key: the key that names it.
        path: the path.
        local: whether it cannot be a hub id.
        suffixes: see ``is_local``.
    """
    if path == "":
        yield key, "must not be empty"
    elif path is not None and (local or is_local(path, suffixes)):
        found = os.path.exists(os.path.expanduser(path))
        yield from (() if found else [(key, f"{path[:200]!r} does not exist; correct it, or override this key")])


def missing_rows(key: Key, path: str | None) -> Problems:
    """A path of rows leads somewhere, or names an embedded corpus that there is."""
    if path is None or not path.startswith("builtin:"):
        yield from missing(key, path)
    elif (name := path.removeprefix("builtin:")) not in BUILTIN_CORPORA:
        yield key, f"{path!r} is not an embedded corpus ({listed(BUILTIN_CORPORA)}){nearest(name, BUILTIN_CORPORA)}"


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
