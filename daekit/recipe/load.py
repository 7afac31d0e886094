"""A recipe file -> a typed, checked and resolved Recipe, or one error that names everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from daekit.errors import UserError
from daekit.recipe.adapter_config import adapter_stage
from daekit.recipe.check import check_recipe
from daekit.recipe.check_adapter import with_base_of
from daekit.recipe.convert import convert_recipe
from daekit.recipe.overrides import apply_overrides
from daekit.recipe.problems import Problems
from daekit.recipe.schema import (
    EvaluationSpec,
    ModelSpec,
    Recipe,
    SourceSpec,
    StageSpec,
    TeacherSpec,
    TokenizerSpec,
    WeightedModelSpec,
)
from daekit.recipe.tree import read_file, read_tree


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        overrides: ``key.sub=value``, laid over the file in this order; values are YAML.

    Returns:
        The recipe, checked, with every implied default filled in (see ``resolve``). Paths are relative to the current
        directory.

    Raises:
        UserError: the file cannot be read, or something in it is wrong; the message names every error, with its line.
    """
    return load_recipe_text(read_file(path, "recipe"), str(path), overrides)


def load_recipe_text(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Like ``load_recipe``, from the text of a recipe; ``name`` is what errors call it."""
    root, unread = read_tree(text, name)
    problems = Problems(name, root)
    if root.value is None:
        raise UserError(f"{name}: the recipe is empty")
    for wrong in unread:
        problems.add_unread(wrong.path, wrong.message, wrong.place)
    apply_overrides(root, overrides, problems)
    recipe = convert_recipe(root, problems)
    if recipe is not None:
        check_recipe(recipe, problems)
    problems.raise_if_any()
    assert recipe is not None  # whatever keeps it from being read is a problem
    return resolve(recipe)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with implied defaults written out; a resolved recipe resolves to itself.

    The student of a stage that names no model is the stage before; one that continues the adapter of a stage has its base, as
    it was loaded there; ``evaluation.models`` are all stages, ``evaluation.sources`` all sources with validation rows,
    ``tokenizer.train.sources`` all sources; ``~`` at the start of a path is the home folder.
    """
    sources = {name: _expand_source(source) for name, source in recipe.sources.items()}
    stages: dict[str, StageSpec] = {}
    before = ""
    for name, stage in recipe.stages.items():
        student = stage.student or ModelSpec()
        origin = adapter_stage(student.adapter)
        if student.path is None and student.stage is None and student.config is None and student.init is None:
            if student.adapter is None:
                student = replace(student, stage=before)
            elif origin is not None:
                student = with_base_of(student, stages[origin].student or ModelSpec())
        stages[name] = _expand_stage(replace(stage, student=student))
        before = name
    return replace(
        recipe,
        output_dir=os.path.expanduser(recipe.output_dir),
        sources=sources,
        stages=stages,
        tokenizer=recipe.tokenizer and _resolve_tokenizer(recipe.tokenizer, tuple(sources)),
        evaluation=recipe.evaluation and _resolve_evaluation(recipe.evaluation, recipe),
    )


def has_validation(source: SourceSpec) -> bool:
    """Whether a source has rows to evaluate on."""
    return bool(source.validation or source.validation_split or source.holdout)


def _resolve_tokenizer(tokenizer: TokenizerSpec, sources: tuple[str, ...]) -> TokenizerSpec:
    train = tokenizer.train and replace(tokenizer.train, sources=tokenizer.train.sources or sources)
    return replace(tokenizer, path=_home(tokenizer.path), train=train)


def _resolve_evaluation(evaluation: EvaluationSpec, recipe: Recipe) -> EvaluationSpec:
    with_rows = tuple(name for name, source in recipe.sources.items() if has_validation(source))
    return replace(
        evaluation,
        models=evaluation.models or tuple(recipe.stages),
        sources=evaluation.sources or with_rows,
    )


def _home(path: str | None) -> str | None:
    return os.path.expanduser(path) if path else path


def _expand_source(source: SourceSpec) -> SourceSpec:
    return replace(source, path=os.path.expanduser(source.path), validation=_home(source.validation))


def _expand_model(model: ModelSpec) -> ModelSpec:
    return replace(model, path=_home(model.path), adapter=_home(model.adapter))


def _expand_student(student: ModelSpec, stage: StageSpec) -> ModelSpec:
    if student.init is None:
        return _expand_model(student)
    init = replace(
        student.init,
        from_=_expand_model(student.init.from_),
        with_=tuple(_expand_model(model) for model in student.init.with_),
        calibration=replace(student.init.calibration, sources=student.init.calibration.sources or stage.data.sources),
    )
    return replace(student, init=init)


def _expand_teacher(teacher: TeacherSpec) -> TeacherSpec:
    members = tuple(WeightedModelSpec(_expand_model(member.model), member.weight) for member in teacher.ensemble)
    return replace(teacher, model=teacher.model and _expand_model(teacher.model), ensemble=members)


def _expand_stage(stage: StageSpec) -> StageSpec:
    return replace(
        stage,
        student=stage.student and _expand_student(stage.student, stage),
        teacher=stage.teacher and _expand_teacher(stage.teacher),
        teachers={domain: _expand_teacher(teacher) for domain, teacher in stage.teachers.items()},
        reference=stage.reference and _expand_teacher(stage.reference),
    )
