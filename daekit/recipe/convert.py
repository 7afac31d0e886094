"""A tree of nodes -> the frozen dataclasses of ``schema.py``, by walking their fields and type hints.

Only the shorthands that ``schema.py`` documents are written out here; everything else follows from the types.
"""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from daekit.recipe.problems import Problems, listed, nearest
from daekit.recipe.schema import MixtureSpec, ModelSpec, Recipe, StageSpec, StudentSpec, TeacherSpec, TokenizerSpec
from daekit.recipe.suite import BENCHMARKS, BenchmarkSpec, SubjectSpec, SuiteSpec, subject_of
from daekit.recipe.trainer_options import read_trainer_options
from daekit.recipe.tree import Node, Path

# What a value becomes that cannot be read: its field keeps its default, or None when it has none.
_BAD = object()

_NOUNS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def convert_recipe(root: Node, problems: Problems) -> Recipe | None:
    """The recipe in ``root``; what cannot be read is noted and replaced by its default or by None.

    Returns:
        None when ``root`` is not even a mapping.
    """
    recipe = _convert(root, Recipe, (), problems)
    return None if recipe is _BAD else recipe


def convert_suite(root: Node, problems: Problems) -> SuiteSpec | None:
    """Like ``convert_recipe``, of a suite."""
    suite = _convert(root, SuiteSpec, (), problems)
    return None if suite is _BAD else suite


def _convert(node: Node, hint: Any, path: Path, problems: Problems) -> Any:
    if problems.unread(path):
        return _BAD
    origin = get_origin(hint)
    if hint is Any:
        return node.plain()
    if origin in (Union, types.UnionType):
        return _union(node, get_args(hint), path, problems)
    if hint in _SHORTHANDS:
        return _SHORTHANDS[hint](node, path, problems)
    if dataclasses.is_dataclass(hint):
        return _dataclass(node, hint, path, problems)
    if origin is Literal:
        return _literal(node, get_args(hint), path, problems)
    if origin is tuple:
        return _tuple(node, hint, path, problems)
    if origin is dict:
        return _mapping(node, hint, path, problems)
    return _scalar(node, hint, path, problems)


def _wrong(node: Node, wanted: str, path: Path, problems: Problems) -> Any:
    problems.add_unread(path, f"wants {wanted}, not {node.show()}", node.place)
    return _BAD


def _noun(hint: Any) -> str:
    """What a hint asks for, in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_noun(member) for member in get_args(hint) if member is not type(None))
    if hint in (ModelSpec, TeacherSpec, TokenizerSpec, SubjectSpec):
        return "a path or a mapping"
    if origin is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if origin is tuple:
        return "a list"
    return _NOUNS.get(hint, "a mapping")


def _union(node: Node, members: tuple[Any, ...], path: Path, problems: Problems) -> Any:
    others = [member for member in members if member is not type(None)]
    if node.value is None and len(others) < len(members):
        return None
    is_list = isinstance(node.value, list)
    fitting = [member for member in others if (get_origin(member) is tuple) == is_list]
    is_mapping = isinstance(node.value, dict)
    fitting = [member for member in fitting if (get_origin(member) is dict) == is_mapping] or fitting
    if len(others) > 1 and not fitting:
        return _wrong(node, " or ".join(_noun(member) for member in others), path, problems)
    return _convert(node, (fitting or others)[0], path, problems)


def _scalar(node: Node, hint: type, path: Path, problems: Problems) -> Any:
    value = node.value
    if hint is str:
        # A plain `no`, `123` or `1e10` is the text that was written; `true` and `null` are nobody's name.
        if isinstance(value, str):
            return value
        if node.text is not None and node.text.lower() not in ("true", "false"):
            return node.text
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if hint is float:
            return float(value)
        if value == int(value):
            return int(value)
    return _wrong(node, _NOUNS[hint], path, problems)


def _literal(node: Node, allowed: tuple[str, ...], path: Path, problems: Problems) -> Any:
    text = node.text if node.text is not None else node.value
    if text in allowed:
        return text
    hint = nearest(text, allowed) if isinstance(text, str) else ""
    problems.add_unread(path, f"{node.show()} is not one of {', '.join(allowed)}{hint}", node.place)
    return _BAD


def _tuple(node: Node, hint: Any, path: Path, problems: Problems) -> Any:
    if not isinstance(node.value, list):
        return _wrong(node, "a list (of one, if need be: [...])", path, problems)
    items = [_convert(item, get_args(hint)[0], (*path, index), problems) for index, item in enumerate(node.value)]
    return _BAD if any(item is _BAD for item in items) else tuple(items)


def _mapping(node: Node, hint: Any, path: Path, problems: Problems) -> Any:
    if not isinstance(node.value, dict):
        return _wrong(node, "a mapping", path, problems)
    key_hint, value_hint = get_args(hint)
    values = {}
    for key, below in node.value.items():
        if get_origin(key_hint) is Literal and key not in get_args(key_hint):
            allowed = get_args(key_hint)
            message = f"unknown key; it must be one of {', '.join(allowed)}{nearest(key, allowed)}"
            problems.add_unread((*path, key), message, below.place)
            continue
        value = _convert(below, value_hint, (*path, key), problems)
        # The name stays, so that whoever refers to it is not reported too.
        values[key] = None if value is _BAD else value
    return values


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Key of the YAML -> type; the field of a key that Python keeps for itself ends with ``_`` (``from_``)."""
    return {name.removesuffix("_"): hint for name, hint in get_type_hints(cls).items()}


def _dataclass(node: Node, cls: Any, path: Path, problems: Problems, also_known: tuple[str, ...] = ()) -> Any:
    if not isinstance(node.value, dict):
        return _wrong(node, f"a mapping with the keys {listed(_hints(cls))}", path, problems)
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, below in node.value.items():
        if key not in hints:
            known = (*hints, *also_known)
            problems.add_unread((*path, key), f"unknown key{nearest(key, known)} (known: {', '.join(known)})", below.place)
            continue
        if cls is StageSpec and key == "trainer":
            # The types of these options are TRL's, not ours.
            value: Any = read_trainer_options(below, (*path, key), problems)
        else:
            value = _convert(below, hints[key], (*path, key), problems)
        if value is not _BAD:
            values[key] = value
    for entry in dataclasses.fields(cls):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        key = entry.name.removesuffix("_")
        if key in values:
            values[entry.name] = values.pop(key)
        elif required:
            values[entry.name] = None
            if key not in node.value:
                message = f"this required key is missing; it wants {_noun(hints[key])}"
                problems.add_unread((*path, key), message, node.place)
    return cls(**values)


# ---- shorthands ------------------------------------------------------------------------------------------------------


def _model(node: Node, path: Path, problems: Problems, also_known: tuple[str, ...] = ()) -> Any:
    """``PATH`` is short for ``{path: PATH}``, ``stage:NAME`` for ``{stage: NAME}``, ``{from: ...}`` for ``{init: ...}``."""
    if isinstance(node.value, dict) and "from" in node.value:
        student = _dataclass(node, StudentSpec, path, problems)
        return _BAD if student is _BAD else ModelSpec(init=student)
    if isinstance(node.value, dict):
        return _dataclass(node, ModelSpec, path, problems, also_known)
    if isinstance(node.value, list) or node.value is None:
        return _wrong(node, _noun(ModelSpec), path, problems)
    text = _scalar(node, str, path, problems)
    if text is _BAD:
        return _BAD
    return ModelSpec(stage=text.removeprefix("stage:").strip()) if text.startswith("stage:") else ModelSpec(path=text)


def _teacher(node: Node, path: Path, problems: Problems) -> Any:
    """Whatever is a model is a teacher too."""
    own = [field.name for field in dataclasses.fields(TeacherSpec)]
    if isinstance(node.value, dict) and any(key in own for key in node.value):
        return _dataclass(node, TeacherSpec, path, problems)
    model = _model(node, path, problems, also_known=("ensemble", "average"))
    return _BAD if model is _BAD else TeacherSpec(model=model)


def _tokenizer(node: Node, path: Path, problems: Problems) -> Any:
    """``PATH`` is short for ``{path: PATH}``."""
    if isinstance(node.value, (dict, list)) or node.value is None:
        return _dataclass(node, TokenizerSpec, path, problems)
    text = _scalar(node, str, path, problems)
    return _BAD if text is _BAD else TokenizerSpec(path=text)


def _mixture(node: Node, path: Path, problems: Problems) -> Any:
    """``[a, b]``, ``{a: 0.25, b: 0.75}``, or either of them as ``{sources: ..., rows: N}``."""
    if not isinstance(node.value, dict) or "sources" not in node.value:
        return _mixture_sources(node, path, problems)
    rows = None
    for key, below in node.value.items():
        if key == "rows":
            rows = _convert(below, int | None, (*path, key), problems)
        elif key != "sources":
            message = f"unknown key{nearest(key, ('sources', 'rows'))} (known: sources, rows)"
            problems.add_unread((*path, key), message, below.place)
    mixture = _mixture_sources(node.value["sources"], (*path, "sources"), problems)
    return _BAD if mixture is _BAD or rows is _BAD else dataclasses.replace(mixture, rows=rows)


def _mixture_sources(node: Node, path: Path, problems: Problems) -> Any:
    if isinstance(node.value, list):
        sources = _convert(node, tuple[str, ...], path, problems)
        return _BAD if sources is _BAD else MixtureSpec(sources=sources)
    if not isinstance(node.value, dict):
        return _wrong(node, "a list of sources ([a, b]) or a share of rows for each ({a: 0.25, b: 0.75})", path, problems)
    weights = {key: _convert(below, float, (*path, key), problems) for key, below in node.value.items()}
    if any(weight is _BAD for weight in weights.values()):
        return _BAD
    return MixtureSpec(sources=tuple(weights), weights=tuple(weights.values()))


def _subject(node: Node, path: Path, problems: Problems) -> Any:
    """``PATH``, ``PATH+ADAPTER`` and ``https://host/v1#model`` are short for their parts."""
    if isinstance(node.value, (dict, list)) or node.value is None:
        return _dataclass(node, SubjectSpec, path, problems)
    text = _scalar(node, str, path, problems)
    return _BAD if text is _BAD else subject_of(text)


def _benchmark(node: Node, path: Path, problems: Problems) -> Any:
    """The ``type`` says which keys a benchmark has."""
    kind = node.child("type")
    if not isinstance(node.value, dict) or kind is None:
        return _wrong(node, f"a mapping with a `type` (one of {', '.join(BENCHMARKS)})", path, problems)
    name = _literal(kind, tuple(BENCHMARKS), (*path, "type"), problems)
    return _BAD if name is _BAD else _dataclass(node, BENCHMARKS[name], path, problems)


_SHORTHANDS = {
    ModelSpec: _model,
    TeacherSpec: _teacher,
    TokenizerSpec: _tokenizer,
    MixtureSpec: _mixture,
    SubjectSpec: _subject,
    BenchmarkSpec: _benchmark,
}
