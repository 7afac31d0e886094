"""Which model is the base of a stage's adapter, and what follows from that for models that could share it."""

from __future__ import annotations

from daekit.errors import UserError
from daekit.recipe.adapter_config import adapter_stage, read_adapter_config, same_base
from daekit.recipe.model import ModelSpec
from daekit.recipe.schema import Recipe
from daekit.recipe.validation import dotted


def earlier_stages(recipe: Recipe, name: str) -> list[str]:
    """The stages that run before ``name``."""
    names = list(recipe.stages)
    return names[: names.index(name)]


def base_of(recipe: Recipe, name: str) -> ModelSpec | None:
    """The model whose weights a LoRA stage leaves as they are; None where the recipe cannot say."""
    stage = recipe.stages[name]
    if stage is None:
        return None
    student = stage.student or ModelSpec()
    if student.path or student.stage or student.config:
        return student.model_copy(update={"adapter": None})
    origin, earlier = adapter_stage(student.adapter), earlier_stages(recipe, name)
    if origin is not None:
        return base_of(recipe, origin) if origin in earlier else None
    if student.adapter is not None:
        try:
            config = read_adapter_config(student.adapter)
        except UserError:  # noted where the student is checked
            return None
        base = {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
        return student.model_copy(update={"adapter": None, **base})
    return student.model_copy(update={"stage": earlier[-1]}) if earlier else None


def with_base_of(student: ModelSpec, origin: ModelSpec) -> ModelSpec:
    """A student that continues the adapter of a stage, with whatever it does not say of its base taken from that stage."""
    said = {key: getattr(student, key) for key in ModelSpec.model_fields if student.changed(key)}
    return origin.model_copy(update=said)


def sharing_notes(recipe: Recipe) -> list[str]:
    """What a resolved recipe does that its author may not want: a base loaded twice, an adapter on another precision."""
    notes = []
    for name, stage in recipe.stages.items():
        base = base_of(recipe, name) if stage.is_lora else None
        for key, teacher in stage.teachers_by_key().items():
            model = teacher.model
            origin = None if model is None else adapter_stage(model.adapter) or model.stage
            theirs = base_of(recipe, origin) if origin is not None and recipe.stages[origin].is_lora else None
            if model is None or base is None or theirs is None or not may_be_one(base, theirs):
                continue
            where = dotted(("stages", name, *key))
            if model.adapter is not None and theirs.quantization != base.quantization:
                notes.append(
                    f"{where}: the adapter of stage {origin!r} was trained on a base {_precision(theirs)} and runs on one "
                    f"{_precision(base)}: it is not quite the same model there"
                )
            elif model.adapter is None:
                notes.append(
                    f"{where}: stage {origin!r} is a LoRA adapter of this student's base; as {{stage: {origin}}} it is merged "
                    f"into a second copy of it. {{adapter: stage:{origin}}} runs it on the student's base, loaded once"
                    + (f" ({_precision(base)}, which is not quite the merged model)" if base.quantization else "")
                )
    return notes


def may_be_one(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two bases can be one model; of a stage and a path nobody knows before the run."""
    if one.path is not None and other.path is not None:
        return same_base(one.path, other.path) and one.revision == other.revision
    if one.stage is not None and other.stage is not None:
        return (one.stage, one.checkpoint) == (other.stage, other.checkpoint)
    return one.config is None and other.config is None


def _precision(base: ModelSpec) -> str:
    return f"in {base.quantization}" if base.quantization else "without quantization"


def name_of(base: ModelSpec) -> str:
    revision = f" (revision {base.revision})" if base.revision else ""
    return repr(base.path or (f"stage:{base.stage}" if base.stage else "a config")) + revision
