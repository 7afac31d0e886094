"""YAML text -> a tree of nodes that know where they were written. Nothing is constructed but text, numbers, lists and mappings.

The rules for plain scalars are those of YAML 1.1 without its traps: ``1e-4`` is a number, ``010`` and ``12:30`` are not. A
plain scalar also keeps its text, so that ``save_strategy: no`` is the word "no" where a text is wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import yaml

from daekit.errors import UserError

KeyPath: TypeAlias = tuple[str | int, ...]
Scalar: TypeAlias = bool | int | float | str | None

_PREFIX = "tag:yaml.org,2002:"
_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
# A file with more values, or deeper ones, is a mistake or an attack (aliases of aliases): a recipe has a few hundred, six deep.
_MOST_NODES = 20_000
DEEPEST = 40
_LARGEST_FILE = 4 * 2**20  # bytes
_SHOWN = 80  # characters of a value in a message
_HALF = "holds half of a character (a lone surrogate), which no file can hold; write the character itself"


class Place(NamedTuple):
    """Where a value was written: a line of the file (or of a suite that it names), or an override of the command line."""

    line: int | None = None
    override: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.override is not None:
            return f"override {self.override}: "
        file = "" if self.file is None else f"{self.file}, "
        return f"{file}line {self.line}: " if self.line is not None else ""


@dataclass
class Node:
    """A value of the recipe at the key ``path``. ``text`` is what was written when it is a scalar without quotes."""

    value: dict[str, Node] | list[Node] | Scalar
    place: Place
    path: KeyPath = ()
    text: str | None = None

    def child(self, key: str | int) -> Node | None:
        """The value below ``key``, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        return self.value[key] if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value) else None

    def moved(self, path: KeyPath) -> Node:
        """A copy that lies at ``path`` and remembers where it was written."""
        value = self.value
        if isinstance(value, dict):
            value = {key: node.moved((*path, key)) for key, node in value.items()}
        elif isinstance(value, list):
            value = [node.moved((*path, index)) for index, node in enumerate(value)]
        return Node(value, self.place, path, self.text)

    def find(self, path: KeyPath) -> Node | None:
        """The value at ``path``, or None."""
        node = self.locate(path)
        return node if len(node.path) == len(self.path) + len(path) else None

    def locate(self, path: KeyPath) -> Node:
        """The value at ``path``, or the nearest one above it that exists."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node

    def show(self) -> str:
        """The value, for a message."""
        if isinstance(self.value, dict):
            return "a mapping" if self.value else "an empty mapping"
        if isinstance(self.value, list):
            return "a list" if self.value else "an empty list"
        if self.value is None:
            return "null (nothing)"
        shown = self.text if self.text is not None else repr(self.value)
        return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(shown)} characters)"

    def plain(self) -> object:
        """The value as plain Python objects."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class Loader(yaml.SafeLoader):
    """Composes nodes with the rules above."""

    yaml_implicit_resolvers = {}

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Stop at once where brackets are nested too deeply: PyYAML looks ahead, which takes seconds there."""
        if self.flow_level > DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)


class Dumper(yaml.SafeDumper):
    """Quotes every text that ``Loader`` (or any YAML 1.1 reader) would take for something else; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these line breaks of Unicode into spaces unless they are escaped.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_PREFIX + "str", text, style)


Dumper.add_representer(str, _represent_text)
_PATTERNS = {"bool": _BOOL, "int": _INT, "float": _FLOAT, "null": _NULL, "merge": re.compile(r"^<<$")}
for _kind, _pattern in _PATTERNS.items():
    Loader.add_implicit_resolver(_PREFIX + _kind, _pattern, None)
Dumper.add_implicit_resolver(_PREFIX + "float", _FLOAT, list("-+0123456789."))


def _whole_characters(text: str) -> str | None:
    """``text`` with pairs of surrogates (JSON writes emoji so) joined; None if one stands alone."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def read_file(path: str | Path, kind: str) -> str:
    """The text of a YAML file; ``kind`` is what the UserError for one that cannot be read calls it."""
    try:
        with Path(path).open("rb") as file:  # no further: it may be a device
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE:,} bytes")
        return text.decode("utf-8")
    except (OSError, ValueError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = error.strerror if isinstance(error, OSError) else why
        raise UserError(f"{kind} {str(path)!r} cannot be read: {reason}; give the path of a YAML file") from None


def read_tree(
    text: str,
    name: str,
    note: Callable[[KeyPath, str, Place], None],
    path: KeyPath = (),
    override: str | None = None,
    file: str | None = None,
) -> Node:
    """The tree of one YAML document.

    Args:
        text: the text of the document.
        name: what errors call it.
        note: is told what cannot be read (a key given twice, a tag, a number that is not finite).
        path: where the document lies in a greater one.
        override: the override that it is the value of, if it is one.
        file: written into the place of each value, for a document that becomes part of another.

    Raises:
        UserError: the text is not YAML at all, or an alias in it has no end.
    """
    try:
        root = yaml.compose(text, Loader=Loader)
        if root is None:
            return Node(None, Place(None if override else 1, override, file), path)
        reader = _Reader(name, note, override, file)
        return reader.read(root, path, (), reader.place(root))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and override is None else ""
        raise UserError(f"{name}: {where}not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply to be a recipe") from None


class _Reader:
    """Turns PyYAML's nodes into ours; ``above`` are the nodes on the way down, to find an alias inside its own anchor."""

    def __init__(self, name: str, note: Callable[[KeyPath, str, Place], None], override: str | None, file: str | None) -> None:
        self.name, self.note, self.override, self.file = name, note, override, file
        self.count = 0

    def place(self, node: yaml.Node) -> Place:
        return Place(None if self.override else node.start_mark.line + 1, self.override, self.file)

    def read(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...], place: Place) -> Node:
        if any(node is other for other in above):
            raise UserError(f"{self.name}: {self.place(node)}an anchor contains an alias of itself")
        if len(above) > DEEPEST:
            raise RecursionError
        self.one_more()
        above = (*above, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            pairs = self.pairs(node, path, above)
            return Node({key: self.read(below, (*path, key), above, at) for key, (below, at) in pairs.items()}, place, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            items = enumerate(node.value)
            return Node([self.read(item, (*path, index), above, self.place(item)) for index, item in items], place, path)
        if isinstance(node, yaml.ScalarNode):
            kind, pattern = node.tag.removeprefix(_PREFIX), _PATTERNS.get(node.tag.removeprefix(_PREFIX))
            if kind == "str" or (pattern is not None and pattern.match(node.value)):
                return self.scalar(node, kind, path, place)
        self.note(path, f"the tag {node.tag!r} is not allowed in a recipe; write the plain value", self.place(node))
        return Node(None, place, path)

    def one_more(self) -> None:
        self.count += 1
        if self.count > _MOST_NODES:
            raise UserError(f"{self.name}: more than {_MOST_NODES} values: this is not a recipe")

    def pairs(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, tuple[yaml.Node, Place]]:
        """The keys of a mapping; those merged with ``<<`` come last and never replace its own."""
        own: dict[str, tuple[yaml.Node, Place]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            self.one_more()  # counted here, too: merged mappings may merge others, and none of their values be read
            place = self.place(key)
            if key.tag == _PREFIX + "merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif not isinstance(key, yaml.ScalarNode):
                self.note(path, "a key must be a name, not a list or a mapping", place)
            elif (name := _whole_characters(key.value)) is None:
                self.note(path, f"the key {key.value!r} {_HALF}", place)
            elif name in own:
                first = str(own[name][1]).rstrip(": ")
                self.note((*path, name), f"this key is given twice (first in {first}); keep one", place)
            else:
                own[name] = (value, place)
        for mapping in merged:
            self.one_more()
            if not isinstance(mapping, yaml.MappingNode) or any(mapping is other for other in above):
                self.note(path, "`<<` merges mappings only, and none that contains itself", self.place(mapping))
                continue
            for name, pair in self.pairs(mapping, path, (*above, mapping)).items():
                own.setdefault(name, pair)
        return own

    def scalar(self, node: yaml.ScalarNode, kind: str, path: KeyPath, place: Place) -> Node:
        text, value = node.value, _value(kind, node.value)
        if value is None and kind != "null":
            wrong = _HALF if kind == "str" else "is not a finite number of sensible size"
            self.note(path, f"{text[:_SHOWN]!r} {wrong}", self.place(node))
        return Node(value, place, path, text if node.style is None and kind != "null" else None)


def _value(kind: str, text: str) -> Scalar:
    """The value of a scalar; None for one that no value can be made of."""
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int":
        digits = text.replace("_", "")
        return int(digits) if len(digits) < 20 else None
    if kind == "float":
        number = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        return number if math.isfinite(number) else None
    return None if kind == "null" else _whole_characters(text)
