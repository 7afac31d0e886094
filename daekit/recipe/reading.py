"""How the pydantic models of recipes and suites are read: from a tree that knows lines, with all errors at once.

Made in Python, a ``Spec`` is an ordinary pydantic model. Read from a file, what is wrong with it is noted in ``Errors`` and
replaced by the field's default, or by None where it has none, so that everything else is read and checked, too.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from daekit.errors import listed, nearest
from daekit.recipe.tree import Node, Path
from daekit.recipe.validation import Errors

_UNREAD: Any = object()  # stands for the value of a field that cannot be read

# ---- what pydantic is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A value of the file that is neither a mapping nor a list."""

    node: Node
    path: Path


class Written(dict[str, Any]):
    """A mapping of the file; ``also_known`` are keys that it might have had in another form."""

    def __init__(self, values: Mapping[str, Any], path: Path, also_known: tuple[str, ...] = ()) -> None:
        super().__init__(values)
        self.path, self.also_known = path, also_known


class WrittenList(list[Any]):
    """A list of the file."""

    path: Path


class _Known(dict[str, Any]):
    """Field -> value, of keys that there are."""


def written(node: Node, path: Path = ()) -> Written | WrittenList | Leaf:
    """A tree in the form that ``Spec`` reads."""
    if isinstance(node.value, dict):
        return Written({key: written(below, (*path, key)) for key, below in node.value.items()}, path)
    if isinstance(node.value, list):
        items = WrittenList(written(item, (*path, index)) for index, item in enumerate(node.value))
        items.path = path
        return items
    return Leaf(node, path)


def as_text(value: Any) -> Any:
    """A plain `no`, `123` or `1e10` is the text that was written; `true` and `null` are nobody's name."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, Leaf):
        return value
    node = value.node
    plain = not isinstance(node.value, str) and node.text is not None and node.text.lower() not in ("true", "false")
    return node.text if plain else node.value


def as_whole(value: Any) -> Any:
    """A number without fraction is whole, however it is written (`1e3`)."""
    value = as_plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_plain(value: Any) -> Any:
    """The value in plain Python objects."""
    if isinstance(value, Leaf):
        return value.node.value
    if isinstance(value, Written):
        return {key: as_plain(below) for key, below in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, WrittenList) else value


# The types of scalars in a schema: each takes what YAML writes so, and nothing else.
Text = Annotated[str, BeforeValidator(as_text)]
Whole = Annotated[int, Strict(), BeforeValidator(as_whole)]
Number = Annotated[float, Strict(), BeforeValidator(as_plain)]
Flag = Annotated[bool, Strict(), BeforeValidator(as_plain)]
Free = Annotated[dict[str, Any], BeforeValidator(as_plain)]
Choice = BeforeValidator(as_text)  # goes with a Literal


class Spec(BaseModel):
    """A mapping of a recipe or a suite: frozen, without unknown keys.

    Attributes:
        FOREIGN: keys that belong elsewhere -> where.
        TYPES: of a class that a ``type`` chooses: every type there is.
        NOUN: what it is, with its shorthands, in an error.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )
    FOREIGN: ClassVar[Mapping[str, str]] = {}
    TYPES: ClassVar[tuple[str, ...]] = ()
    NOUN: ClassVar[str] = ""

    @classmethod
    def expand(cls, value: Any) -> Any:
        """The mapping for which a shorter form stands."""
        return value

    def compact(self, dumped: dict[str, Any]) -> Any:
        """The form in which a file writes it."""
        return dumped

    def changed(self, key: str) -> bool:
        """Whether a field has another value than its default."""
        return getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)

    @classmethod
    def read(cls, root: Node, errors: Errors) -> Self | None:
        """The tree as this class; what is wrong with it is noted. None when it is not even a mapping."""
        return cls.model_validate(written(root), context=errors)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        errors = info.context
        if isinstance(value, (Spec, _Known)):  # pydantic 2.14 calls this twice where a recursive model is a field of another
            return handler(value)
        if not isinstance(errors, Errors):
            return handler(cls.expand(value))
        value = cls.expand(value)
        noun = cls.NOUN or f"a mapping with the keys {listed(cls._keys())}"
        if value is None:
            raise ValueError(f"wants {noun}, not null (nothing)")
        if not isinstance(value, Written):
            errors.add_unread(value.path, f"wants {noun}, not {errors.root.locate(value.path).show()}")
            return None
        errors.paths.append(value.path)
        try:
            return handler(cls._known(value, errors))
        finally:
            errors.paths.pop()

    @classmethod
    def _known(cls, value: Written, errors: Errors) -> _Known:
        """Field -> value, or ``_UNREAD``; unknown and missing keys are noted."""
        keys, values = cls._keys(), _Known()
        for key, below in value.items():
            path = (*value.path, key)
            if key in keys:
                values[keys[key]] = _UNREAD if errors.is_unread(path) else below
            elif key not in cls.FOREIGN:
                known = (*keys, *value.also_known)
                errors.add_unread(path, f"unknown key{nearest(key, known)} (known: {', '.join(known)})")
            elif not (isinstance(below, Leaf) and below.node.value is None):
                errors.add_unread(path, cls.FOREIGN[key])
        for key, name in keys.items():
            required = cls.model_fields[name].is_required() or (name == "type" and cls.TYPES)
            if required and name not in values:
                what = cls.model_fields[name].description or f"it must be one of {', '.join(cls.TYPES)}"
                errors.add_unread((*value.path, key), f"this required key is missing: {what.partition(';')[0].rstrip('.')}")
                values[name] = _UNREAD
        return values

    @classmethod
    def _keys(cls) -> dict[str, str]:
        """Key of the file -> field; the field of a key that Python keeps for itself ends with ``_`` (``from_``)."""
        return {each.alias or name: name for name, each in cls.model_fields.items()}

    @field_validator("*", mode="wrap")
    @classmethod
    def _read_field(cls, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        errors, name = info.context, str(info.field_name)
        if not isinstance(errors, Errors):
            return handler(value)
        if isinstance(value, Leaf) and value.node.value is None:
            value = None
        each = cls.model_fields[name]
        if value is not _UNREAD:
            try:
                read = handler(value)
                if read is not None or value is None:
                    return read
            except ValidationError as error:
                path = (*errors.paths[-1], each.alias or name)
                errors.add_validation(path, error, cls.TYPES if name == "type" else ())
        return None if each.is_required() else each.get_default(call_default_factory=True)

    @model_serializer(mode="wrap")
    def _dump(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        values = handler(self)
        unset = {each.alias or name for name, each in type(self).model_fields.items() if getattr(self, name) is None}
        return self.compact({key: value for key, value in values.items() if key not in unset})


def by_type(classes: Mapping[str, type[Spec]]) -> Callable[[Any], str]:
    """What tells the class of a mapping: its ``type``, or, for one that is unknown, what looks most like it."""

    def tag(value: Any) -> str:
        if not isinstance(value, Mapping):
            return str(getattr(value, "type", next(iter(classes))))
        kind = as_text(value.get("type"))
        if isinstance(kind, str) and kind in classes:
            return kind
        alike = {name: difflib.SequenceMatcher(None, name, str(kind)[:200]).ratio() for name in classes}
        return max(classes, key=lambda name: (len(classes[name]._keys().keys() & value.keys()), alike[name]))

    return tag
