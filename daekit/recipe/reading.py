"""How the pydantic models of recipes and suites are read: from a tree that knows lines, with all errors at once.

Made in Python, a ``Spec`` is an ordinary pydantic model. Read from a file, what is wrong with it is noted in ``Errors`` and
replaced by the field's default, or by None where it has none, so that everything else is read and checked, too.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from daekit.errors import UserError, listed, nearest
from daekit.recipe.tree import Node
from daekit.recipe.validation import Errors, Problems, dotted

_UNREAD: Any = object()  # stands for the value of a field that cannot be read


class _Known(dict[str, Any]):
    """Field -> value, of keys that there are."""


def content(value: Any) -> Any:
    """A mapping or list of the file as a dict or list of what lies in it; a scalar as text, where it may be one.

    A plain `no`, `123` or `1e10` is then the text that was written; `true` and `null` are nobody's name.
    """
    if not isinstance(value, Node):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    plain = not isinstance(value.value, str) and value.text is not None and value.text.lower() not in ("true", "false")
    return value.text if plain else value.value


def as_whole(value: Any) -> Any:
    """A number without fraction is whole, however it is written (`1e3`)."""
    value = as_plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_plain(value: Any) -> Any:
    """The value in plain Python objects."""
    if isinstance(value, Node):
        return value.plain()
    if isinstance(value, dict):
        return {key: as_plain(below) for key, below in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list) else value


# The types of scalars in a schema: each takes what YAML writes so, and nothing else.
Text = Annotated[str, BeforeValidator(content)]
Whole = Annotated[int, Strict(), BeforeValidator(as_whole)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]  # of numpy
Number = Annotated[float, Strict(), BeforeValidator(as_plain)]
Flag = Annotated[bool, Strict(), BeforeValidator(as_plain)]
Free = Annotated[dict[str, Any], BeforeValidator(as_plain)]
Choice = BeforeValidator(content)  # goes with a Literal
FilePath = Annotated[Text, AfterValidator(os.path.expanduser)]  # `~` at its start is the home folder


class Spec(BaseModel):
    """A mapping of a recipe or a suite: frozen, without unknown keys.

    Attributes:
        ELSEWHERE: keys that belong elsewhere -> where.
        ALSO: further keys that an error about an unknown key names.
        TYPES: of a class that a ``type`` chooses: every type there is (see ``ByType``).
        NOUN: what it is, with its shorthands, in an error.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", defer_build=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )
    ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    ALSO: ClassVar[tuple[str, ...]] = ()
    TYPES: ClassVar[tuple[str, ...]] = ()
    NOUN: ClassVar[str] = ""

    @classmethod
    def expand(cls, value: Any) -> Any:
        """The mapping for which a shorter form stands; ``value`` is the ``content`` of what was written."""
        return value

    def compact(self, dumped: dict[str, Any]) -> Any:
        """The form in which a file writes it."""
        return dumped

    def problems(self) -> Problems:
        """What contradicts itself in a mapping that was read from a file; what could not be read is None or its default."""
        yield from ()

    def changed(self, *keys: str) -> list[str]:
        """Those of the fields that have another value than their default."""
        defaults = {key: type(self).model_fields[key].get_default(call_default_factory=True) for key in keys}
        return [key for key, default in defaults.items() if getattr(self, key) != default]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """One with these settings, from Python.

        Raises:
            UserError: a setting that does not exist or is out of bounds; all of them at once.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = [
                "".join(f"{key}={each['input']!r}: " for key in each["loc"][:1]) + each["msg"].removeprefix("Value error, ")
                for each in error.errors()
            ]
            raise UserError("; ".join(wrong)) from error

    @classmethod
    def read(cls, errors: Errors) -> Self | None:
        """The file as this class; what is wrong with it is noted. None when it is not even a mapping."""
        return cls.model_validate(errors.root, context=errors)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        errors = info.context
        if isinstance(value, (Spec, _Known)):  # pydantic 2.14 calls this twice where a recursive model is a field of another
            return handler(value)
        mapping = cls.expand(content(value))
        if not isinstance(errors, Errors):
            return handler(mapping)
        path = value.path if isinstance(value, Node) else errors.paths[-1]
        if not isinstance(mapping, dict):
            noun = cls.NOUN or f"a mapping with the keys {listed(cls._keys())}"
            errors.add_unread(path, f"wants {noun}, not {errors.root.locate(path).show()}")
            return None
        errors.paths.append(path)
        try:
            read = handler(cls._known(mapping, errors))
            errors.add_all(read.problems(), path)
            return read
        finally:
            errors.paths.pop()

    @classmethod
    def _known(cls, mapping: dict[str, Any], errors: Errors) -> _Known:
        """Field -> value, or ``_UNREAD``; unknown and missing keys are noted."""
        keys, values, above = cls._keys(), _Known(), errors.paths[-1]
        for key, below in mapping.items():
            path = (*above, key)
            if key in keys:
                values[keys[key]] = _UNREAD if errors.is_unread(path) else below
            elif key not in cls.ELSEWHERE:
                known = (*keys, *cls.ALSO)
                names = f" (known: {', '.join(known)})" if len(known) < 50 else ""
                errors.add_unread(path, f"unknown key{nearest(key, known)}{names}")
            elif as_plain(below) is not None:
                where = cls.ELSEWHERE[key].replace("{stage}", dotted(above[:-1])).replace("{key}", key)
                errors.add_unread(path, where)
        for key, name in keys.items():
            required = cls.model_fields[name].is_required() or (name == "type" and cls.TYPES)
            if required and name not in values:
                what = cls.model_fields[name].description or f"it must be one of {', '.join(cls.TYPES)}"
                errors.add_unread((*above, key), f"this required key is missing: {what.partition(';')[0].rstrip('.')}")
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
        each = cls.model_fields[name]
        if value is not _UNREAD:
            errors.paths.append(value.path if isinstance(value, Node) else errors.paths[-1])
            try:
                container = isinstance(value, Node) and not isinstance(value.value, str | int | float)
                read = handler(value.value if container else value)  # a scalar stays what it is, for its text may count
                if read is not None or not errors.is_unread(errors.paths[-1]):
                    return read
            except ValidationError as error:
                errors.add_validation(errors.paths[-1], error, cls.TYPES if name == "type" else (), value)
            finally:
                errors.paths.pop()
        return None if each.is_required() else each.get_default(call_default_factory=True)

    @model_serializer(mode="wrap")
    def _dump(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        values = handler(self)
        unset = {each.alias or name for name, each in type(self).model_fields.items() if getattr(self, name) is None}
        return self.compact({key: value for key, value in values.items() if key not in unset})


class ByType:
    """Annotates a union of classes that their ``type`` tells apart; an unknown one is read as what looks most like it."""

    def __init__(self, classes: Mapping[str, type[Spec]]) -> None:
        self.classes = classes
        for each in classes.values():
            each.TYPES = tuple(classes)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(each) for name, each in self.classes.items()}
        return core_schema.tagged_union_schema(choices, self._type_of)

    def _type_of(self, value: Any) -> str:
        if isinstance(value, Spec):
            return next(name for name, each in self.classes.items() if isinstance(value, each))
        keys = content(value) if isinstance(content(value), dict) else {}
        kind = content(keys.get("type"))
        alike = {name: difflib.SequenceMatcher(None, name, str(kind)[:200]).ratio() for name in self.classes}
        return max(alike, key=lambda name: (kind == name, len(self.classes[name]._keys().keys() & keys), alike[name]))
