"""``key.sub=value`` of the command line, laid over the tree of a recipe before it is typed."""

from __future__ import annotations

from collections.abc import Sequence

from daekit.errors import UserError
from daekit.recipe.problems import Problems, dotted, nearest
from daekit.recipe.tree import Node, Path, Place, read_tree

# The mappings whose keys are the user's own names: a misspelt one must not make a new entry.
_NAMED = (("sources",), ("stages",), ("benchmarks",), ("models",))


def apply_overrides(root: Node, overrides: Sequence[str], problems: Problems) -> None:
    """Set each ``key.sub=value`` in the tree, the value read as YAML; mappings that are missing on the way are made.

    A text on the way that is short for a mapping (a model, a teacher, a tokenizer) becomes that mapping; an item of a list
    is addressed by its index, from 0.
    """
    for override in overrides:
        keys, equals, text = override.partition("=")
        path: Path = tuple(keys.split("."))
        if not equals or not all(path):
            problems.add((), "is not of the form key.sub=value", Place(override=repr(override)))
            continue
        if not text.strip():
            problems.add((), "has no value; write null to unset a key", Place(override=repr(override)))
            continue
        try:
            value, unread = read_tree(text, "its value", override=repr(override))
        except UserError as error:
            problems.add((), str(error), Place(override=repr(override)))
            continue
        for wrong in unread:
            problems.add_unread((*path, *wrong.path), wrong.message, wrong.place)
        message = _set(root, path, value)
        if message:
            problems.add((), message, Place(override=repr(override)))


def _set(root: Node, path: Path, value: Node) -> str:
    """Put ``value`` at ``path``; returns what is wrong, or nothing."""
    node = root
    for depth, key in enumerate(path[:-1]):
        below, wrong = _step(node, key, path[:depth], value.place)
        if wrong or below is None:
            return wrong
        node = below
    key, above = path[-1], path[:-1]
    if isinstance(node.value, str):
        _expand(node)
    if isinstance(node.value, list):
        index, wrong = _index(node, str(key), above)
        if not wrong:
            node.value[index] = value
        return wrong
    if node.value is None:
        node.value, node.text = {}, None
    if not isinstance(node.value, dict):
        return f"{dotted(above)} is {node.show()}, not a mapping: it has no {key!r}"
    node.value[str(key)] = value
    return ""


def _step(node: Node, key: str | int, above: Path, place: Place) -> tuple[Node | None, str]:
    """(the node below ``key``, made if it is missing; what is wrong, or nothing)."""
    if isinstance(node.value, str):
        _expand(node)
    if isinstance(node.value, list):
        index, wrong = _index(node, str(key), above)
        return (None, wrong) if wrong else (node.value[index], "")
    if node.value is None:
        node.value, node.text = {}, None
    if not isinstance(node.value, dict):
        return None, f"{dotted(above)} is {node.show()}, not a mapping: it has no {key!r}"
    if key not in node.value:
        if above in _NAMED:
            return None, f"{dotted(above)} has no {key!r}{nearest(str(key), node.value)}"
        node.value[str(key)] = Node({}, place)
    return node.value[str(key)], ""


def _expand(node: Node) -> None:
    """A text that stands for a mapping becomes it: ``PATH`` is ``{path: PATH}``, ``stage:NAME`` is ``{stage: NAME}``."""
    text = str(node.value)
    key = "stage" if text.startswith("stage:") else "path"
    node.value, node.text = {key: Node(text.removeprefix("stage:").strip(), node.place)}, None


def _index(node: Node, key: str, above: Path) -> tuple[int, str]:
    """(the index that ``key`` names in a list; what is wrong, or nothing)."""
    assert isinstance(node.value, list)
    count = len(node.value)
    if not key.isdecimal() or int(key) >= count:
        return 0, f"{dotted(above)} is a list of {count}: address an item by its index from 0, not {key!r}, or set it whole"
    return int(key), ""
