"""The JSON Schemas of recipes and suites, by which editors complete and check them.

What a short form stands for is written here once more, for JSON Schema has no word for it; whether several keys go together is
checked by daekit only.
"""

from __future__ import annotations

from typing import Any, Literal

from daekit.recipe.schema import Recipe
from daekit.recipe.suite import SuiteSpec
from daekit.recipe.teacher import KEEPS
from daekit.recipe.trainer_options import trainer_options

_TEXT = {"type": "string"}
_SOURCES = [
    {"type": "array", "items": _TEXT},
    {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
]
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
# Class -> other forms that it is written in.
_SHORT: dict[str, list[dict[str, Any]]] = {
    "ModelSpec": [_TEXT, {"$ref": "#/$defs/StudentSpec"}],
    "TeacherSpec": [{"$ref": "#/$defs/ModelSpec"}, {"const": "labels"}],
    "GeneratorSpec": [_TEXT],
    "PromptsSpec": [_TEXT],
    "CacheSpec": [{"enum": list(KEEPS)}],
    "TokenizerSpec": [_TEXT],
    "SuiteModelSpec": [_TEXT],
    "EvaluatedModel": [_TEXT, {"type": "object", "minProperties": 1, "maxProperties": 1}],
}


def json_schema(kind: Literal["recipe", "suite"]) -> dict[str, Any]:
    """The JSON Schema of a recipe or of a suite.

    Raises:
        UserError: the installed TRL or transformers, whose options a recipe may set, is not of a version that is known.
    """
    schema = (Recipe if kind == "recipe" else SuiteSpec).model_json_schema()
    for name, each in schema["$defs"].items():
        if "trainer" in each.get("properties", {}):
            each["properties"]["trainer"] = {"$ref": "#/$defs/TrainerOptions"}
        if "type" in each.get("properties", {}):
            each["required"] = sorted({*each.get("required", []), "type"})
        if name in _SHORT:
            schema["$defs"][name] = {"anyOf": [*_SHORT[name], each]}
    if kind == "recipe":
        schema["$defs"]["TrainerOptions"] = trainer_options().model_json_schema()
        each = schema["$defs"]["MixtureSpec"]
        sources = {"anyOf": _SOURCES, "description": "Names of sources, or a share of rows for each."}
        each["properties"] = {"sources": sources, "rows": each["properties"]["rows"]}
        schema["$defs"]["MixtureSpec"] = {"anyOf": [*_SOURCES, each]}
        suites = schema["$defs"]["EvaluationSpec"]["properties"]["suites"]
        suites["items"] = {"anyOf": [_TEXT, suites["items"]]}
    # a model made from its teacher is written as its parts, so `init` is no key
    for name in ("ModelSpec", "EvaluatedModel", "GeneratorSpec"):
        if name in schema["$defs"]:
            del schema["$defs"][name]["anyOf"][-1]["properties"]["init"]
    if kind == "recipe":  # `cache` is written beside the keys of a model
        model, teacher = (schema["$defs"][name]["anyOf"] for name in ("ModelSpec", "TeacherSpec"))
        own = teacher[-1]["properties"]
        del own["server"]  # its keys are written in its place
        for each in (model[-1], schema["$defs"]["ServerSpec"]):
            teacher.append(each | {"properties": each["properties"] | {"cache": own["cache"]}})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_translated(schema)}


def _translated(schema: Any) -> Any:
    """With the bounds of values that may be null under JSON Schema's names; pydantic leaves its own there."""
    if isinstance(schema, list):
        return [_translated(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(key, key): _translated(below) for key, below in schema.items()}
