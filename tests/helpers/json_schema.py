"""Enough of JSON Schema to see what an editor would say of a file."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
KNOWN = {"type", "enum", "const", "anyOf", "oneOf", "properties", "additionalProperties", "required", "items", "minItems"}
KNOWN |= {"maxItems", "prefixItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "propertyNames"}
KNOWN |= {"minProperties", "maxProperties"}
SILENT = {"$schema", "$defs", "$ref", "title", "description", "default", "discriminator"}


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether ``value`` is valid under ``schema``, whose references lie in ``root``."""
    if isinstance(schema, bool):
        return schema
    unknown = schema.keys() - KNOWN - SILENT
    assert not unknown, f"teach this validator {unknown}"
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(
        isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds
    ):
        return False
    for words in ("anyOf", "oneOf"):
        if words in schema and not any(fits(value, each, root) for each in schema[words]):
            return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if isinstance(value, dict):
        return _fits_object(value, schema, root)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        parts = all(fits(item, first[at] if at < len(first) else rest, root) for at, item in enumerate(value))
        return parts and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    if isinstance(value, int | float):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above = "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
        return low <= value <= high and above and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    return True


def _fits_object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    count = schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value))
    names = all(fits(key, schema.get("propertyNames", True), root) for key in value)
    return (
        count
        and names
        and set(schema.get("required", ())) <= value.keys()
        and all(fits(below, properties.get(key, more), root) for key, below in value.items())
    )


def modeline(text: str) -> str:
    """The schema that a YAML file names on its first line, for editors."""
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found, "the first line names no schema"
    return found[1]
