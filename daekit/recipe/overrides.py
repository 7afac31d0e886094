"""``key.sub=value`` of the command line, laid over the tree of a recipe before it is typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daekit.errors import UserError, nearest
from daekit.recipe.model import STAGE, stage_of
from daekit.recipe.suite import subject_keys
from daekit.recipe.tree import Node, Place
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
        names, place = keys.split("."), Place(override=repr(override))
        if not equals or not all(names):
            errors.add((), "is not of the form key.sub=value", place)
        elif not text.strip():
            errors.add((), "has no value; write null to unset a key", place)
        elif len(names) > _DEEPEST:
            errors.add((), f"has {len(names)} keys; nothing lies so deep", place)
        else:
            try:
                *above, last = names
                node = errors.root
                for name in above:
                    node = _below(node, name, place)
                _put(node, last, errors.read(text, (*node.path, last), override=repr(override)))
            except UserError as error:
                errors.add((), str(error), place)


def _below(node: Node, name: str, place: Place) -> Node:
    """The value below a key, made if it is missing."""
    found = node.child(_key(node, name))
    if found is None:
        if node.path in _NAMED and isinstance(node.value, dict):
            raise UserError(f"{dotted(node.path)} has no {name!r}{nearest(name, node.value)}")
        found = Node({}, place, (*node.path, name))
        _put(node, name, found)
    return found


def _put(node: Node, name: str, value: Node) -> None:
    key = _key(node, name)
    if isinstance(node.value, list):
        node.value[int(key)] = value
    elif isinstance(node.value, dict):
        node.value[str(key)] = value


def _key(node: Node, name: str) -> str | int:
    """The key, or index, that a name of an override means; ``node`` becomes the mapping that it stands for.

    Raises:
        UserError: it is neither a mapping nor stands for one, or a list without such an index.
    """
    if isinstance(node.value, str):
        text = node.value
        if node.path[-2:-1] == ("models",):
            keys: dict[str, Any] = subject_keys(text)
        else:
            keys = stage_of(text.removeprefix(STAGE)) if text.startswith(STAGE) else {"path": text}
        node.value = {key: Node(below, node.place, (*node.path, key)) for key, below in keys.items()}
    if node.value is None:
        node.value = {}
    if isinstance(node.value, list):
        count = len(node.value)
        if not (name.isdecimal() and len(name) < 10 and int(name) < count):
            raise UserError(
                f"{dotted(node.path)} is a list of {count}: address an item by its index from 0, not {name!r}, or set it whole"
            )
        return int(name)
    if not isinstance(node.value, dict):
        raise UserError(f"{dotted(node.path)} is {node.show()}, not a mapping: it has no {name!r}")
    node.text = None
    return name
