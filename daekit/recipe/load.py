"""A recipe or suite file -> a typed and checked object, or one error that names everything that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from daekit.errors import UserError, listed, nearest
from daekit.recipe.adapter_config import adapter_stage
from daekit.recipe.checks import check_recipe, evaluated_by_default
from daekit.recipe.model import ModelSpec
from daekit.recipe.reading import Spec
from daekit.recipe.schema import EvaluatedModel, Recipe, StageSpec
from daekit.recipe.suite import SuiteModelSpec, SuiteSpec
from daekit.recipe.tree import DEEPEST, KeyPath, Node, Place, read_file
from daekit.recipe.validation import Errors, bad_directory, dotted, is_name

S = TypeVar("S", bound=Spec)
_SUITES: KeyPath = ("evaluation", "suites")
_MODEL = "model:"
# The mappings whose keys are the user's own names: a misspelt one must not make a new entry.
_NAMED = (("sources",), ("stages",), ("benchmarks",), ("models",))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
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
    path: str | Path, models: Mapping[str, str] | None = None, overrides: Sequence[str] = (), need_models: bool = True
) -> SuiteSpec:
    """Read a suite from a YAML file.

    Args:
        path: the file.
        models: name -> model as ``--model`` names it, added to those of the file before the overrides.
        overrides: as of ``load_recipe``.
        need_models: whether a suite without any model is an error.

    Raises:
        UserError: see ``load_recipe``.
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
    return suite


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

    def put(node: Node, within: tuple[str, ...] = ()) -> None:
        while isinstance(node.value, str) and node.value.startswith(_MODEL):
            name = node.value.removeprefix(_MODEL)
            if name in within:
                errors.add_unread(node.path, f"`models.{name}` stands for itself; give its path")
                break
            if name in models:
                within = (*within, name)
                copy, errors.copies[node.path] = models[name].moved(node.path), ("models", name)
                node.value, node.text = copy.value, copy.text
            else:
                there = listed(models) if models else "none"
                errors.add_unread(node.path, f"`models` names no {name!r} (there are: {there}){nearest(name, models)}")
                break
        below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
        path = node.child("path") if isinstance(node.value, dict) else None
        is_named = path is not None and isinstance(path.value, str)
        for each in below:
            put(each, within)
        if is_named and path is not None and isinstance(path.value, dict) and isinstance(node.value, dict):
            more = {key: each for key, each in node.value.items() if key != "path"}
            errors.copies[node.path] = errors.copies[path.path]
            node.value = {key: each.moved((*node.path, key)) for key, each in path.value.items()} | more

    for name, model in list(models.items()):
        put(model, (name,))
    for part in ("sources", "stages", "evaluation", "tokenizer"):
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


def _check_prices(errors: Errors, suite: SuiteSpec | None, path: KeyPath = ()) -> None:
    """The prices in a file are not those of another judge that an override names."""
    judges: list[KeyPath] = [(), *(("benchmarks", name) for name in (suite and suite.benchmarks) or {})]
    for where in [(*path, *each, "judge") for each in judges]:
        nodes = {key: errors.root.find((*where, key)) for key in ("model", "base_url", "price_prompt", "price_completion")}
        said = [key for key in ("model", "base_url") if (node := nodes[key]) is not None and node.place.override is not None]
        for key in ("price_prompt", "price_completion") if said else ():
            node = nodes[key]
            if node is not None and node.value is not None and node.place.override is None:
                message = f"{node.show()} is the price of the judge in the file, and {said[0]} names another; give that one's"
                errors.add_check((*where, key), message)


def _add_models(root: Node, models: Mapping[str, str]) -> None:
    if not models or not isinstance(root.value, dict):
        return
    below = root.value.setdefault("models", Node({}, Place(), ("models",)))
    if below.value is None:
        below.value = {}
    if isinstance(below.value, dict):
        below.value |= {name: Node(text, Place(override=f"--model {name}"), ("models", name)) for name, text in models.items()}


# ---- overrides ------------------------------------------------------------------------------------------------------


def apply_overrides(errors: Errors, overrides: Sequence[str]) -> None:
    """Set each ``key.sub=value`` in the tree, the value read as YAML; mappings that are missing on the way are made.

    A text on the way that is short for a mapping (a model, a teacher, a tokenizer) becomes that mapping; an item of a list
    is addressed by its index, from 0.
    """
    for override in overrides:
        keys, equals, text = override.partition("=")
        names, place = keys.split("."), Place(override=repr(override))
        if not equals or not all(names):
            errors.add((), "is not of the form key.sub=value", place)
        elif not text.strip():
            errors.add((), "has no value; write null to unset a key", place)
        elif len(names) > DEEPEST:
            errors.add((), f"has {len(names)} keys; nothing lies so deep", place)
        else:
            try:
                *above, last = names
                node = errors.root
                for name in above:
                    node = _below(node, name, place)
                _put(node, last, errors.read(text, (*node.path, last), override=repr(override)))
            except UserError as error:
                errors.add((), str(error), place)


def _below(node: Node, name: str, place: Place) -> Node:
    """The value below a key, made if it is missing."""
    found = node.child(_key(node, name))
    if found is None:
        if node.path in _NAMED and isinstance(node.value, dict):
            raise UserError(f"{dotted(node.path)} has no {name!r}{nearest(name, node.value)}")
        found = Node({}, place, (*node.path, name))
        _put(node, name, found)
    return found


def _put(node: Node, name: str, value: Node) -> None:
    key = _key(node, name)
    if isinstance(node.value, list):
        node.value[int(key)] = value
    elif isinstance(node.value, dict):
        node.value[str(key)] = value


def _key(node: Node, name: str) -> str | int:
    """The key, or index, that a name of an override means; ``node`` becomes the mapping that it stands for.

    Raises:
        UserError: it is neither a mapping nor stands for one, or a list without such an index.
    """
    if isinstance(node.value, str):
        short = SuiteModelSpec if node.path[-2:-1] == ("models",) else ModelSpec
        keys = short.expand(node.value)
        node.value = {key: Node(below, node.place, (*node.path, key)) for key, below in keys.items()}
    if node.value is None:
        node.value = {}
    if isinstance(node.value, list):
        count = len(node.value)
        if not (name.isdecimal() and len(name) < 10 and int(name) < count):
            raise UserError(f"{dotted(node.path)} is a list of {count}: name an index from 0, not {name!r}, or set it whole")
        return int(name)
    if not isinstance(node.value, dict):
        raise UserError(f"{dotted(node.path)} is {node.show()}, not a mapping: it has no {name!r}")
    node.text = None
    return name


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with implied defaults written out; a resolved recipe resolves to itself.

    The student of a stage that names no model is the stage before; one that continues the adapter of a stage has its base, as
    it was loaded there; ``evaluation.models`` are all stages after the first one's student as it was, where that is loaded
    from a path; ``evaluation.sources`` all sources with validation rows, ``tokenizer.train.sources`` all that no model
    writes.
    """
    stages: dict[str, StageSpec] = {}
    before = ""
    for name, stage in recipe.stages.items():
        student = stage.student or ModelSpec()
        origin = adapter_stage(student.adapter)
        if student.init is not None:
            calibration = _filled(student.init.calibration, "sources", stage.data.sources)
            student = student.model_copy(update={"init": student.init.model_copy(update={"calibration": calibration})})
        elif student.path is None and student.stage is None and student.config is None:
            if student.adapter is None:
                student = student.model_copy(update={"stage": before})
            elif origin is not None:
                student = student.with_base_of(stages[origin].student or ModelSpec())
        stages[name] = stage.model_copy(update={"student": student})
        before = name
    tokenizer, evaluation = recipe.tokenizer, recipe.evaluation
    if tokenizer is not None and tokenizer.train is not None:
        train = _filled(
            tokenizer.train, "sources", tuple(name for name, source in recipe.sources.items() if source.generated is None)
        )
        tokenizer = tokenizer.model_copy(update={"train": train})
    if evaluation is not None:
        models = (EvaluatedModel.model_validate(name) for name in evaluated_by_default(recipe))
        evaluation = _filled(evaluation, "models", tuple(models))
        watched = tuple(name for name, source in recipe.sources.items() if source.has_validation)
        evaluation = _filled(evaluation, "sources", watched)
    return recipe.model_copy(update={"stages": stages, "tokenizer": tokenizer, "evaluation": evaluation})


def _filled(spec: S, key: str, default: object) -> S:
    """``spec`` with a default in place of nothing."""
    return spec if getattr(spec, key) else spec.model_copy(update={key: default})
