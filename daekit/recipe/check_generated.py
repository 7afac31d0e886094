"""Sources that a model writes: what of them contradicts itself, or comes too late for the stage that needs it."""

from __future__ import annotations

import re

from daekit.errors import listed
from daekit.recipe.adapter_config import BARE_BASE
from daekit.recipe.check_models import check_origin
from daekit.recipe.generated import GeneratedSpec, generator_stages
from daekit.recipe.judge import url_problems
from daekit.recipe.paths import check_exists, check_known
from daekit.recipe.schema import Recipe
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors

_OF_THE_MODEL = ("path", "stage", "config", "adapter", "init")


def check_generated(recipe: Recipe, name: str, spec: GeneratedSpec, path: Path, errors: Errors) -> None:
    """Note what is wrong with a generated source."""
    if spec.model is not None:
        _check_model(recipe, name, spec, (*path, "model"), errors)
    if spec.matching is not None:
        try:
            re.compile(spec.matching)
        except re.error as error:
            errors.add_check((*path, "matching"), f"{spec.matching[:80]!r} is no regular expression ({error})")
    if spec.rows is None and spec.attempts is not None:
        errors.add_check((*path, "attempts"), "belongs to `rows`; without it each prompt is answered once")
    prompts, where = spec.prompts, (*path, "prompts")
    if prompts is None:
        return
    ways = [key for key in ("written", "source", "path") if getattr(prompts, key) is not None]
    if len(ways) != 1:
        errors.add_check(where, f"must be exactly one of self, bos, {{path: ...}} and {{source: ...}}, not {listed(ways)}")
        return
    if prompts.written is not None:
        if spec.rows is None:
            errors.add_check((*path, "rows"), "must say how many rows to write, for there are no prompts to count")
        if spec.temperature == 0:
            errors.add_check((*path, "temperature"), "is 0, so that all rows would be the same; draw them at 1, say")
    if prompts.path is not None and not prompts.path.startswith("builtin:"):
        check_exists(prompts.path, (*where, "path"), errors)
    if prompts.source is not None:
        others = [other for other in recipe.sources if other != name]
        check_known([prompts.source], others, "other source", (*where, "source"), errors)
        other = recipe.sources.get(prompts.source)
        if other is not None and other.generated is not None:
            errors.add_check((*where, "source"), f"{prompts.source!r} is written by a model, too; name a source with a path")
    reading = ("split", "name", "revision", "columns", "chat", "limit")
    for keys, allowed, whose in (
        (reading, prompts.path is not None, "`path`"),
        (("temperature", "top_p", "max_new_tokens"), prompts.written == "self", "`written: self`"),
    ):
        for key in keys:
            if not allowed and prompts.changed(key) and not (key == "limit" and prompts.source is not None):
                errors.add_check((*where, key), f"belongs to {whose}: it would do nothing")


def _check_model(recipe: Recipe, name: str, spec: GeneratedSpec, path: Path, errors: Errors) -> None:
    model, stages = spec.model, list(recipe.stages or {})
    own = [key for key in _OF_THE_MODEL if getattr(model, key) is not None]
    if model.url is not None:
        if own:
            errors.add_check(path, f"is an endpoint (url) or a model ({listed(own)}), not both")
        for sentence in url_problems(model.url):
            errors.add_check((*path, "url"), sentence)
        if not model.served_model:
            errors.add_check((*path, "served_model"), "is missing: name the endpoint's model: https://HOST/v1#MODEL")
        if spec.prompts is not None and spec.prompts.written is not None:
            errors.add_check(
                (*path, "url"), f"an endpoint answers messages; prompts: {spec.prompts.written} needs a model here"
            )
        return
    for key in ("served_model", "api_key_env"):
        if getattr(model, key) is not None:
            errors.add_check((*path, key), "belongs to an endpoint (url)")
    if model.init is not None or model.config is not None:
        errors.add_check(path, "random weights, or parts of a teacher, have nothing to write; give a path or a stage")
        return
    if model.offload:
        errors.add_check((*path, "offload"), "belongs to a teacher in training; use device_map or quantization")
    if model.adapter == BARE_BASE:
        errors.add_check((*path, "adapter"), "the base is a model of its own here; give its path")
    elif model.adapter is None:
        check_origin(recipe, model, path, errors, stages, stages, None)
    for origin in generator_stages(spec):
        if model.adapter is not None:
            check_known([origin], stages, "stage", (*path, "adapter"), errors)
        for user, stage in (recipe.stages or {}).items():
            used = stage is not None and stage.data is not None and name in (stage.data.sources or ())
            if used and origin in stages and stages.index(origin) >= stages.index(user):
                errors.add_check(
                    path, f"stage {user!r} trains on this source, and {origin!r} is not complete then; name an earlier stage"
                )
