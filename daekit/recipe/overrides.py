"""``key.sub=value`` of the command line, laid over the tree of a recipe before it is typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daekit.errors import UserError, nearest
from daekit.recipe.model import STAGE, stage_of
from daekit.recipe.suite import subject_keys
from daekit.recipe.tree import Node, Path, Place, read_tree
from daekit.recipe.validation import Errors, dotted

# The mappings whose keys are the user's own names: a misspelt one must not make a new entry.
_NAMED = (("sources",), ("stages",), ("benchmarks",), ("models",))
_DEEPEST = 40  # keys of a path


def apply_overrides(errors: Errors, overrides: Sequence[str]) -> None:
    """Set each ``key.sub=value`` in the tree, the value read as YAML; mappings that are missing on the way are made.

    A text on the way that is short for a mapping (a model, a teacher, a tokenizer) becomes that mapping; an item of a list
    is addressed by its index, from 0.
    """
    for override in overrides:
        keys, equals, text = override.partition("=")
        path: Path = tuple(keys.split("."))
        if not equals or not all(path):
            errors.add((), "is not of the form key.sub=value", Place(override=repr(override)))
            continue
        if not text.strip():
            errors.add((), "has no value; write null to unset a key", Place(override=repr(override)))
            continue
        try:
            value, unread = read_tree(text, "its value", override=repr(override))
        except UserError as error:
            errors.add((), str(error), Place(override=repr(override)))
            continue
        errors.add_all_unread(unread, path)
        message = _set(errors.root, path, value)
        if message:
            errors.add((), message, Place(override=repr(override)))


def _set(root: Node, path: Path, value: Node) -> str:
    """Put ``value`` at ``path``; returns what is wrong, or nothing."""
    node = root
    if len(path) > _DEEPEST:
        return f"has {len(path)} keys; nothing lies so deep"
    for depth, key in enumerate(path[:-1]):
        below, wrong = _step(node, key, path[:depth], value.place)
        if wrong or below is None:
            return wrong
        node = below
    key, above = path[-1], path[:-1]
    if isinstance(node.value, str):
        _expand(node, above)
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
        _expand(node, above)
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


def _expand(node: Node, path: Path) -> None:
    """A text that stands for a mapping becomes it: a path, ``stage:NAME``, a model of a suite."""
    text = str(node.value)
    if path[-2:-1] == ("models",):
        keys: dict[str, Any] = subject_keys(text)
    else:
        keys = stage_of(text.removeprefix(STAGE)) if text.startswith(STAGE) else {"path": text}
    node.value, node.text = {key: Node(below, node.place) for key, below in keys.items()}, None


def _index(node: Node, key: str, above: Path) -> tuple[int, str]:
    """(the index that ``key`` names in a list; what is wrong, or nothing)."""
    assert isinstance(node.value, list)
    count = len(node.value)
    if not (key.isdecimal() and len(key) < 10 and int(key) < count):
        return 0, f"{dotted(above)} is a list of {count}: address an item by its index from 0, not {key!r}, or set it whole"
    return int(key), ""
