"""Checks of models that are adapters on one base, and what a reader should know of a recipe that loads a base twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from daekit.errors import UserError
from daekit.recipe.adapter_config import (
    BARE_BASE,
    adapter_stage,
    read_adapter_config,
    require_same_base,
    require_shareable,
    same_base,
)
from daekit.recipe.problems import Problems, dotted, listed
from daekit.recipe.schema import ModelSpec, Recipe, StageSpec, TeacherSpec
from daekit.recipe.tree import Path


def check_adapter(recipe: Recipe, name: str, path: Path, model: ModelSpec, problems: Problems) -> None:
    """Note what is wrong with a model of stage ``name`` that says ``adapter``; that its stage is an earlier one is known."""
    stage = recipe.stages[name]
    where = (*path, "adapter")
    student = model is stage.student
    (_check_student if student else _check_teacher)(stage, path, model, problems)
    if model.adapter == BARE_BASE:
        if student:
            problems.add_check(where, "a student cannot train the bare base's adapter; leave `adapter` out and give `lora`")
        return
    origin = adapter_stage(model.adapter)
    if origin is not None and not is_lora(recipe.stages[origin]):
        problems.add_check(where, f"the stage {origin!r} trains no LoRA adapter; name its result itself: `stage:{origin}`")
        return
    ours = base_of(recipe, name)
    if origin is not None:
        theirs = base_of(recipe, origin)
        if ours is not None and theirs is not None and not _may_be_one(ours, theirs):
            problems.add_check(
                where,
                f"the stage {origin!r} trains an adapter of {_name(theirs)}, not of this student's base {_name(ours)}: on "
                "another base it is another model",
            )
        return
    assert model.adapter is not None
    try:
        config = read_adapter_config(model.adapter)
        require_shareable(model.adapter, config)
        if ours is not None and ours.path is not None:
            revisions = (config.get("revision"), ours.revision)
            require_same_base(model.adapter, config["base_model_name_or_path"], ours.path, revisions)
    except UserError as error:
        problems.add_check(where, str(error))


def is_lora(stage: StageSpec | None) -> bool:
    """Whether a stage trains an adapter."""
    return stage is not None and (stage.lora is not None or (stage.student is not None and stage.student.adapter is not None))


def base_of(recipe: Recipe, name: str) -> ModelSpec | None:
    """The model whose weights a LoRA stage leaves as they are; None where the recipe cannot say."""
    student = recipe.stages[name].student or ModelSpec()
    if student.path or student.stage or student.config:
        return replace(student, adapter=None)
    origin = adapter_stage(student.adapter)
    if origin is not None:
        earlier = list(recipe.stages)[: list(recipe.stages).index(name)]
        return base_of(recipe, origin) if origin in earlier else None
    if student.adapter is not None:
        try:
            config = read_adapter_config(student.adapter)
        except UserError:  # noted where the student is checked
            return None
        return replace(student, adapter=None, path=config["base_model_name_or_path"], revision=config.get("revision"))
    before = list(recipe.stages)[: list(recipe.stages).index(name)]
    return replace(student, stage=before[-1]) if before else None


def with_base_of(student: ModelSpec, origin: ModelSpec) -> ModelSpec:
    """A student that continues the adapter of a stage, with whatever it does not say of its base taken from that stage."""
    default = ModelSpec()
    said = {each.name: getattr(student, each.name) for each in fields(ModelSpec)}
    return replace(origin, **{key: value for key, value in said.items() if value != getattr(default, key)})


def sharing_notes(recipe: Recipe) -> list[str]:
    """What a resolved recipe does that its author may not want: a base loaded twice, an adapter on another precision."""
    notes = []
    for name, stage in recipe.stages.items():
        base = base_of(recipe, name) if is_lora(stage) else None
        for key, model in _teacher_models(stage):
            origin = adapter_stage(model.adapter) or model.stage
            theirs = base_of(recipe, origin) if origin is not None and is_lora(recipe.stages[origin]) else None
            if base is None or theirs is None or not _may_be_one(base, theirs):
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


def _check_student(stage: StageSpec, path: Path, student: ModelSpec, problems: Problems) -> None:
    if stage.lora is not None:
        message = "the student goes on with an adapter that has its own rank and targets; remove `lora`, or `student.adapter`"
        problems.add_check((*path[:-1], "lora"), message)
    if student.config is not None:
        problems.add_check((*path, "config"), "an adapter belongs to the base it was trained on, not to random weights")
    if student.path is None and student.revision is not None:
        message = "is a revision of which base? give its `path`, or remove it: the adapter's own base is loaded then"
        problems.add_check((*path, "revision"), message)


def _check_teacher(stage: StageSpec, path: Path, model: ModelSpec, problems: Problems) -> None:
    default = ModelSpec()
    more = [each.name for each in fields(ModelSpec) if getattr(model, each.name) != getattr(default, each.name)]
    more.remove("adapter")
    if more:
        problems.add_check(
            (*path, more[0]),
            f"an adapter runs on the student's base, as it is loaded there; remove {listed(more)}, or, for a model of its own, "
            "remove `adapter`",
        )
    if not is_lora(stage):
        message = "is an adapter on the student's base, but the student is trained whole; add `lora`, or name a model"
        problems.add_check((*path, "adapter"), message)


def _teacher_models(stage: StageSpec) -> Iterator[tuple[Path, ModelSpec]]:
    teachers: dict[Path, TeacherSpec | None] = {("teacher",): stage.teacher, ("reference",): stage.reference}
    teachers |= {("teachers", domain): teacher for domain, teacher in stage.teachers.items()}
    for key, teacher in teachers.items():
        if teacher is not None and teacher.model is not None:
            yield key, teacher.model


def _may_be_one(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two bases can be one model; of a stage and a path nobody knows before the run."""
    if one.path is not None and other.path is not None:
        return same_base(one.path, other.path) and one.revision == other.revision
    if one.stage is not None and other.stage is not None:
        return one.stage == other.stage
    return one.config is None and other.config is None


def _precision(base: ModelSpec) -> str:
    return f"in {base.quantization}" if base.quantization else "without quantization"


def _name(base: ModelSpec) -> str:
    return repr(base.path or (f"stage:{base.stage}" if base.stage else "a config")) + (
        f" (revision {base.revision})" if base.revision else ""
    )
