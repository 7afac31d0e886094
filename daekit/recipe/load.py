"""A recipe or suite file -> a typed and checked object, or one error that names everything that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from daekit.errors import UserError, listed, nearest
from daekit.recipe.adapter_config import adapter_stage
from daekit.recipe.bases import with_base_of
from daekit.recipe.checks import check_recipe, evaluated_by_default
from daekit.recipe.model import ModelSpec
from daekit.recipe.overrides import apply_overrides
from daekit.recipe.paths import bad_directory, is_name
from daekit.recipe.reading import Spec
from daekit.recipe.rows import SourceSpec
from daekit.recipe.schema import STUDENT_AS_IT_WAS, DAEStage, EvaluatedModel, KDStage, Recipe, StageSpec
from daekit.recipe.suite import SuiteSpec
from daekit.recipe.teacher import TeacherSpec
from daekit.recipe.tree import Node, Path, Place, read_file
from daekit.recipe.validation import Errors

S = TypeVar("S", bound=Spec)
_SUITES: Path = ("evaluation", "suites")
_MODEL = "model:"


def load_recipe(path: str | FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        overrides: ``key.sub=value``, laid over the file in this order; values are YAML.

    Returns:
        The recipe, checked, with every implied default filled in (see ``resolve``) and the suites that it names read. Paths are
        relative to the current directory.

    Raises:
        UserError: the file cannot be read, or something in it is wrong; the message names every error, with its line.
    """
    return load_recipe_text(read_file(path, "recipe"), str(path), overrides)


def load_recipe_text(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Like ``load_recipe``, from the text of a recipe; ``name`` is what errors call it."""
    errors = _errors(text, name, "recipe")
    _read_suites(errors)
    for override in overrides:  # one may name a suite, the next reach into it
        apply_overrides(errors, [override])
        _read_suites(errors)
    _put_models(errors)
    recipe = Recipe.read(errors)
    if recipe is not None:
        check_recipe(recipe, errors)
        for index, suite in enumerate(recipe.evaluation.suites if recipe.evaluation else ()):
            _check_prices(errors, suite, ("evaluation", "suites", index))
    errors.raise_if_any()
    assert recipe is not None  # whatever keeps it from being read is an error
    return resolve(recipe)


def load_suite(
    path: str | FilePath, models: Mapping[str, str] | None = None, overrides: Sequence[str] = (), need_models: bool = True
) -> SuiteSpec:
    """Read a suite from a YAML file.

    Args:
        path: the file.
        models: name -> model as ``--model`` names it, added to those of the file before the overrides.
        overrides: ``key.sub=value``, laid over the file in this order.
        need_models: whether a suite without any model is an error.

    Raises:
        UserError: the file cannot be read, or something in it is wrong; the message names every error, with its line.
    """
    return load_suite_text(read_file(path, "suite"), str(path), models, overrides, need_models)


def load_suite_text(
    text: str,
    name: str,
    models: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    need_models: bool = True,
) -> SuiteSpec:
    """Like ``load_suite``, from the text of a suite; ``name`` is what errors call it."""
    errors = _errors(text, name, "suite")
    _add_models(errors.root, models or {})
    apply_overrides(errors, overrides)
    suite = SuiteSpec.read(errors)
    if suite is not None:
        errors.add_all(suite.contradictions())
        errors.add_all(bad_directory("output_dir", suite.output_dir))
        _check_prices(errors, suite)
        if need_models and not suite.models:
            errors.add_check(("models",), "no model to measure: give --model NAME=PATH_OR_URL, or models in the suite")
    errors.raise_if_any()
    assert suite is not None  # whatever keeps it from being read is an error
    return suite.model_copy(update={"output_dir": os.path.expanduser(suite.output_dir)})


def parse_models(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> model of ``--model`` arguments: ``NAME=MODEL``, or ``MODEL``, whose name is its last part.

    Raises:
        UserError: a name twice, or one that may not be a name.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, model = argument.partition("=")
        if not equals or not is_name(name, dots=True):  # an URL or a path may hold a `=`
            last = re.split(r"[/#+]", argument.rstrip("/"))[-1]
            name, model = re.sub(r"[^\w.-]", "-", last).lstrip(".-"), argument
        if not name or not model:
            raise UserError(f"--model {argument!r} names no model; write --model NAME=PATH_OR_URL")
        if name in models:
            raise UserError(f"--model: two models are named {name!r}; give them names: --model NAME=PATH_OR_URL")
        models[name] = model
    return models


def _errors(text: str, name: str, kind: str) -> Errors:
    """The tree of a file, and what in it cannot be read."""
    errors = Errors(name)
    errors.root = errors.read(text)
    if errors.root.value is None and not errors.found:
        raise UserError(f"{name}: the {kind} is empty")
    return errors


def _put_models(errors: Errors) -> None:
    """Put the model NAME of ``models`` where a value is ``model:NAME``; keys beside such a ``path`` go before its own."""
    named = errors.root.child("models")
    models = named.value if named is not None and isinstance(named.value, dict) else {}

    def put(node: Node) -> None:
        if isinstance(node.value, str) and node.value.startswith(_MODEL):
            name = node.value.removeprefix(_MODEL)
            if name in models:
                copy = models[name].moved(node.path)
                node.value, node.text = copy.value, copy.text
            else:
                there = listed(models) if models else "none"
                errors.add_unread(node.path, f"`models` names no {name!r} (there are: {there}){nearest(name, models)}")
        below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
        path = node.child("path") if isinstance(node.value, dict) else None
        is_named = path is not None and isinstance(path.value, str)
        for each in below:
            put(each)
        if is_named and path is not None and isinstance(path.value, dict) and isinstance(node.value, dict):
            more = {key: each for key, each in node.value.items() if key != "path"}
            node.value = {key: each.moved((*node.path, key)) for key, each in path.value.items()} | more

    for part in ("stages", "evaluation", "tokenizer"):
        if (node := errors.root.child(part)) is not None:
            put(node)


def _read_suites(errors: Errors) -> None:
    """Put the content of the suites that a recipe names in their place, so that nothing is read again later."""
    node = errors.root.find(_SUITES)
    for item in node.value if node is not None and isinstance(node.value, list) else ():
        if not isinstance(item.value, str):
            continue
        file = os.path.expanduser(item.value)
        try:
            tree = errors.read(read_file(file, "suite"), item.path, file=file)
        except UserError as error:
            errors.add_unread(item.path, " ".join(str(error).split()), item.place)
            continue
        item.value, item.text = tree.value, tree.text


def _check_prices(errors: Errors, suite: SuiteSpec | None, path: Path = ()) -> None:
    """The prices in a file are not those of another judge that an override names."""
    judges: list[Path] = [(), *(("benchmarks", name) for name in (suite and suite.benchmarks) or {})]
    for where in [(*path, *each, "judge") for each in judges]:
        nodes = {key: errors.root.find((*where, key)) for key in ("model", "base_url", "price_prompt", "price_completion")}
        said = [key for key in ("model", "base_url") if (node := nodes[key]) is not None and node.place.override is not None]
        for key in ("price_prompt", "price_completion") if said else ():
            node = nodes[key]
            if node is not None and node.value is not None and node.place.override is None:
                errors.add_check(
                    (*where, key),
                    f"{node.show()} is the price of the judge in the file, and {said[0]} names another; give that one's, or "
                    "null if it costs nothing",
                )


def _add_models(root: Node, models: Mapping[str, str]) -> None:
    if not models or not isinstance(root.value, dict):
        return
    below = root.value.setdefault("models", Node({}, Place(), ("models",)))
    if below.value is None:
        below.value = {}
    if isinstance(below.value, dict):
        below.value |= {name: Node(text, Place(override=f"--model {name}"), ("models", name)) for name, text in models.items()}


# ---- implied defaults ------------------------------------------------------------------------------------------------


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with implied defaults written out; a resolved recipe resolves to itself.

    The student of a stage that names no model is the stage before; one that continues the adapter of a stage has its base, as
    it was loaded there; ``evaluation.models`` are all stages after the first one's student as it was, where that is loaded
    from a path; ``evaluation.sources`` all sources with validation rows,
    ``tokenizer.train.sources`` all sources that no model writes; ``~`` at the start of a path is the home folder.
    """
    sources = {name: _resolve_source(source) for name, source in recipe.sources.items()}
    stages: dict[str, StageSpec] = {}
    before = ""
    for name, stage in recipe.stages.items():
        student = stage.student or ModelSpec()
        origin = adapter_stage(student.adapter)
        if student.path is None and student.stage is None and student.config is None and student.init is None:
            if student.adapter is None:
                student = student.model_copy(update={"stage": before})
            elif origin is not None:
                student = with_base_of(student, stages[origin].student or ModelSpec())
        stages[name] = _resolve_stage(stage, student)
        before = name
    tokenizer, evaluation = recipe.tokenizer, recipe.evaluation
    if tokenizer is not None:
        tokenizer = _at_home(tokenizer, "path")
        if tokenizer.train is not None and not tokenizer.train.sources:
            lying = tuple(name for name, source in sources.items() if source.generated is None)
            train = tokenizer.train.model_copy(update={"sources": lying})
            tokenizer = tokenizer.model_copy(update={"train": train})
    if evaluation is not None:
        models = evaluation.models or tuple(_evaluated(name) for name in evaluated_by_default(recipe))
        update = {
            "models": tuple(_at_home(model, "path") for model in models),
            "sources": evaluation.sources or tuple(name for name, source in sources.items() if source.has_validation),
            "suites": tuple(_at_home(suite, "output_dir") for suite in evaluation.suites),
        }
        evaluation = evaluation.model_copy(update=update)
    output_dir = os.path.expanduser(recipe.output_dir)
    resolved = {"sources": sources, "stages": stages, "tokenizer": tokenizer, "evaluation": evaluation}
    return recipe.model_copy(update={"output_dir": output_dir, **resolved})


def _evaluated(name: str) -> EvaluatedModel:
    return EvaluatedModel(name=name) if name == STUDENT_AS_IT_WAS else EvaluatedModel(name=name, stage=name)


def _at_home(spec: S, *keys: str) -> S:
    """A spec whose paths begin with the home folder, not with ``~``."""
    paths = {key: getattr(spec, key) for key in keys}
    return spec.model_copy(update={key: os.path.expanduser(path) for key, path in paths.items() if path})


def _resolve_source(source: SourceSpec) -> SourceSpec:
    if (generated := source.generated) is not None:
        parts = {"model": _at_home(generated.model, "path", "adapter"), "prompts": _at_home(generated.prompts, "path")}
        source = source.model_copy(update={"generated": generated.model_copy(update=parts)})
    return _at_home(source, "path", "validation")


def _resolve_model(model: ModelSpec) -> ModelSpec:
    return _at_home(model, "path", "adapter")


def _resolve_teacher(teacher: TeacherSpec) -> TeacherSpec:
    members = tuple(each.model_copy(update={"model": _resolve_model(each.model)}) for each in teacher.ensemble)
    update = {"model": teacher.model and _resolve_model(teacher.model), "ensemble": members}
    return teacher.model_copy(update=update | {"cache": teacher.cache and _at_home(teacher.cache, "path")})


def _resolve_stage(stage: StageSpec, student: ModelSpec) -> StageSpec:
    student = _resolve_model(student)
    if (init := student.init) is not None:
        calibration = init.calibration.model_copy(update={"sources": init.calibration.sources or stage.data.sources})
        parts = {"from_": _resolve_model(init.from_), "with_": tuple(_resolve_model(model) for model in init.with_)}
        student = student.model_copy(update={"init": init.model_copy(update={**parts, "calibration": calibration})})
    update: dict[str, Any] = {"student": student}
    if isinstance(stage, KDStage):
        update["teacher"] = _resolve_teacher(stage.teacher)
    if isinstance(stage, DAEStage):
        update["teachers"] = {domain: _resolve_teacher(teacher) for domain, teacher in stage.teachers.items()}
        update["reference"] = stage.reference and _resolve_teacher(stage.reference)
    return stage.model_copy(update=update)
