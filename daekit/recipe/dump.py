"""A Recipe -> plain mappings and YAML that load back to it, and the facts that a stage's result depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from daekit.recipe.adapter_config import adapter_stage
from daekit.recipe.load import resolve
from daekit.recipe.schema import Recipe, StageSpec
from daekit.recipe.suite import SuiteSpec
from daekit.recipe.tree import Dumper

# Options that say what is watched and kept of a training run; its weights do not depend on them.
_WATCHING = {"disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps"}
_WATCHING |= {"logging_nan_inf_filter", "logging_strategy", "project", "report_to", "run_name"}
_WATCHING |= {"save_steps", "save_strategy", "save_total_limit"}
# Where a teacher lies, and how it is reached, does not change what it says.
_PLACEMENT = ("device_map", "offload", "whole", "base_url", "api_key_env", "concurrency", "max_retries", "timeout")
# Of a generated source: with more rows it goes on; the rest says how attempts are made, not which tokens are drawn.
_COURSE = {"rows", "attempts", "batch_size", "concurrency"}
_VALIDATION = ("validation", "validation_split", "validation_limit")
# With these the training itself looks at the validation rows.
_SCHEDULES_BY_VALIDATION = ("reduce_lr_on_plateau", "greedy")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able mappings and lists, in the form of the YAML.

    Every default is written out; what is unset (None) is left out.
    """
    return recipe.model_dump(mode="json")


def to_yaml(spec: Recipe | SuiteSpec) -> str:
    """YAML, fully explicit; loading it gives ``resolve(recipe)``, or the suite, again."""
    return yaml.dump(spec.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def stage_key(recipe: Recipe, stage_name: str) -> dict[str, Any]:
    """JSON-able facts on which the result of a stage depends: equal facts, equal result on the same rows and versions.

    They hold the stage itself, the seed, the tokenizer, the specs of its sources and, under ``stages``, the same facts of every
    stage that it takes a model from. What is only watched or kept (logging, saving) is left out, and so are the devices of
    teachers, and validation rows unless the training looks at them. The contents of files are not read.

    Raises:
        KeyError: there is no such stage.
    """
    recipe = resolve(recipe)
    stage = recipe.stages[stage_name]
    facts = _unplaced(stage.model_dump(mode="json"))
    facts["trainer"] = {key: value for key, value in stage.trainer.items() if key not in _WATCHING}
    facts.pop("preflight", None)
    init = stage.student and stage.student.init
    sources = [*stage.data.sources, *(init.calibration.sources if init else ())]
    tokenizer: Any = None
    if recipe.tokenizer is not None:
        tokenizer = recipe.tokenizer.model_dump(mode="json")
        sources += recipe.tokenizer.train.sources if recipe.tokenizer.train else ()
    else:
        # Without a tokenizer of its own a run takes that of the first student.
        first = next(iter(recipe.stages.values())).student
        tokenizer = first and _unplaced(first.model_dump(mode="json"))
    return {
        "stage": facts,
        "seed": recipe.seed,
        "tokenizer": tokenizer,
        "sources": {name: _source(recipe, stage, name) for name in sorted(set(sources))},
        "stages": {name: stage_key(recipe, name) for name in _stages_used(recipe, stage, sources)},
    }


def student_key(recipe: Recipe, stage_name: str) -> dict[str, Any]:
    """The same for the student that a stage begins with, if it is made from a teacher: equal facts, equal student."""
    recipe = resolve(recipe)
    stage, facts = recipe.stages[stage_name], stage_key(recipe, stage_name)
    assert stage.student is not None and stage.student.init is not None
    init = stage.student.init
    used = {model.stage for model in (init.from_, *init.with_)}
    return {
        "student": stage.student.model_dump(mode="json"),
        "seed": recipe.seed_of(stage_name),
        "tokenizer": facts["tokenizer"],
        "sources": {name: _source(recipe, stage, name) for name in init.calibration.sources},
        "stages": {name: key for name, key in facts["stages"].items() if name in used},
    }


def _source(recipe: Recipe, stage: StageSpec, name: str) -> dict[str, Any]:
    looks = stage.trainer.get("load_best_model_at_end") or (stage.trainer.get("lr_scheduler_type") in _SCHEDULES_BY_VALIDATION)
    facts = recipe.sources[name].model_dump(mode="json")
    if recipe.sources[name].generated is not None:
        facts["generated"] = generated_key(recipe, name) | {"rows": facts["generated"].get("rows")}
    return facts if looks else {key: value for key, value in facts.items() if key not in _VALIDATION}


def generated_key(recipe: Recipe, name: str) -> dict[str, Any]:
    """What of a generated source decides its attempts, one by one: not how many there are, nor how they are made."""
    spec = recipe.sources[name].generated
    assert spec is not None
    facts: dict[str, Any] = _unplaced(spec.model_dump(mode="json", exclude=_COURSE))
    if spec.prompts.source is not None:
        facts["source"] = recipe.sources[spec.prompts.source].model_dump(mode="json", exclude=set(_VALIDATION))
    return facts


def _stages_used(recipe: Recipe, stage: StageSpec, sources: Iterable[str]) -> list[str]:
    """Names of the stages whose results a stage starts from or follows, or that write its sources."""
    named = {name for model in stage.models().values() for name in (model.stage, adapter_stage(model.adapter))}
    written = {name for source in sources if (spec := recipe.sources[source].generated) is not None for name in spec.stages()}
    return sorted({name for name in named if name is not None} | written)


def _unplaced(facts: Any) -> Any:
    if isinstance(facts, dict):
        facts = {key: _unplaced(below) for key, below in facts.items() if key not in _PLACEMENT}
        if isinstance(cache := facts.get("cache"), dict):
            facts["cache"] = {key: below for key, below in cache.items() if key != "path"}
        return facts
    return [_unplaced(item) for item in facts] if isinstance(facts, list) else facts
