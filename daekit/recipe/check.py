"""What the types cannot say: the parts of a recipe checked against each other.

Every check notes what it finds, so that all errors are told at once. A value that could not be read is None or its default
here; whatever would only follow from that is dropped by ``Problems.add_check``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath

from daekit.errors import UserError
from daekit.recipe.adapter_config import adapter_stage
from daekit.recipe.check_adapter import check_adapter, is_lora
from daekit.recipe.check_placement import check_placement
from daekit.recipe.check_stage import check_stage
from daekit.recipe.check_student import check_student, models_of_student
from daekit.recipe.load_suite import load_suite
from daekit.recipe.problems import Problems, listed, nearest
from daekit.recipe.schema import (
    BUILTIN_CORPORA,
    EvaluationSpec,
    ModelSpec,
    Recipe,
    SourceSpec,
    StageSpec,
    TeacherSpec,
    TokenizerSpec,
)
from daekit.recipe.tree import Path

_NAME = re.compile(r"^[\w-]+$")
_NAME_RULE = "may hold letters, digits, `_` and `-` only (it becomes a folder, a metric and a key of overrides)"
_DATA_FILES = (".jsonl", ".json", ".ndjson", ".parquet")
# These would be read as keys of the long form of a mixture.
_RESERVED_SOURCES = ("sources", "rows")


def check_recipe(recipe: Recipe, problems: Problems) -> None:
    """Note everything in ``recipe`` that contradicts itself, refers to nothing, or cannot be trained."""
    for key in ("name", "output_dir"):
        if not getattr(recipe, key):
            problems.add_check((key,), "must not be empty")
    if recipe.seed < 0:
        problems.add_check(("seed",), f"{recipe.seed} must not be negative")
    for name, source in (recipe.sources or {}).items():
        _check_name(name, ("sources", name), problems)
        if name in _RESERVED_SOURCES:
            problems.add_check(("sources", name), "this name is taken by the long form of `data`; choose another")
        if source is not None:
            _check_source(source, ("sources", name), problems)
    if not recipe.sources:
        problems.add_check(("sources",), "must name at least one source of rows")
    if not recipe.stages:
        problems.add_check(("stages",), "must name at least one stage")
    for name, stage in (recipe.stages or {}).items():
        _check_name(name, ("stages", name), problems)
        if stage is not None:
            _check_models(recipe, name, stage, problems)
            check_stage(recipe, name, stage, problems)
            check_student(recipe, name, stage, problems)
    _check_tokenizer(recipe, problems)
    if recipe.evaluation:
        _check_evaluation(recipe, recipe.evaluation, problems)


def _check_name(name: str, path: Path, problems: Problems) -> None:
    if not _NAME.match(name):
        problems.add_check(path, f"the name {name!r} {_NAME_RULE}")


def _positive(spec: object, keys: Iterable[str], path: Path, problems: Problems) -> None:
    for key in keys:
        value = getattr(spec, key)
        if value is not None and value <= 0:
            problems.add_check((*path, key), f"{value} must be greater than 0")


def _check_exists(value: str, path: Path, suffixes: tuple[str, ...], problems: Problems) -> None:
    """A path that can only be a local one must exist; others may be hub ids, which are not looked up."""
    local = value.startswith(("./", "../", "/", "~")) or value in (".", "..") or value.endswith(suffixes)
    if local and not FilePath(value).expanduser().exists():
        key = ".".join(str(part) for part in path)
        problems.add_check(path, f"{value!r} does not exist; correct it, or set it on the command line: {key}=...")


def _check_source(source: SourceSpec, path: Path, problems: Problems) -> None:
    if source.domain is not None and not _NAME.match(source.domain):
        problems.add_check((*path, "domain"), f"the domain {source.domain!r} {_NAME_RULE}")
    for key in ("path", "validation"):
        _check_rows_path(getattr(source, key), (*path, key), problems)
    ways = [key for key in ("validation", "validation_split", "holdout") if getattr(source, key) is not None]
    if len(ways) > 1:
        problems.add_check((*path, ways[-1]), f"{listed(ways)} exclude each other; set all but one to null (or leave them out)")
    if not ways and source.validation_limit is not None:
        message = "there are no validation rows to limit; give validation, validation_split or holdout"
        problems.add_check((*path, "validation_limit"), message)
    _positive(source, ("holdout", "limit", "validation_limit"), path, problems)


def _check_rows_path(value: str | None, path: Path, problems: Problems) -> None:
    if value is None:
        return
    if value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in BUILTIN_CORPORA:
            hint = nearest(name, BUILTIN_CORPORA)
            problems.add_check(path, f"{value!r} is not an embedded corpus ({listed(BUILTIN_CORPORA)}){hint}")
    elif not value:
        problems.add_check(path, "must not be empty")
    else:
        _check_exists(value, path, _DATA_FILES, problems)


# ---- models ----------------------------------------------------------------------------------------------------------


def models_of_teacher(teacher: TeacherSpec, path: Path) -> Iterator[tuple[Path, ModelSpec]]:
    """Every model of a teacher with its key path."""
    if teacher.model is not None:
        yield path, teacher.model
    for index, member in enumerate(teacher.ensemble):
        if member.model is not None:
            yield (*path, "ensemble", index, "model"), member.model


def models_of_stage(name: str, stage: StageSpec) -> Iterator[tuple[Path, ModelSpec]]:
    """Every model that a stage names, with its key path."""
    path = ("stages", name)
    if stage.student is not None:
        yield (*path, "student"), stage.student
        if stage.student.init is not None:
            yield from models_of_student(stage.student.init, (*path, "student"))
    teachers: dict[Path, TeacherSpec | None] = {("teacher",): stage.teacher, ("reference",): stage.reference}
    teachers |= {("teachers", domain): teacher for domain, teacher in stage.teachers.items()}
    for key, teacher in teachers.items():
        if teacher is not None:
            yield from models_of_teacher(teacher, (*path, *key))


def _check_models(recipe: Recipe, name: str, stage: StageSpec, problems: Problems) -> None:
    names = list(recipe.stages)
    earlier = names[: names.index(name)]
    if stage.student is None and not earlier:
        message = "the first stage has no stage before it to take the student from; give a path, a config or `from`"
        problems.add_check(("stages", name, "student"), message)
    for path, model in models_of_stage(name, stage):
        if model.init is not None:
            if model is not stage.student:
                problems.add_check(
                    path, "only the student of a stage is made `from` another model; make it in a stage of its own"
                )
            continue
        check_placement(model, path, model is stage.student, problems)
        ways = [key for key in ("path", "stage", "config") if getattr(model, key) is not None]
        if model.adapter is not None:
            _check_adapter_of(recipe, name, path, model, problems)
            if not ways or model is not stage.student:
                continue
        if not ways and earlier and model is stage.student:  # the result of the stage before, loaded as the other keys say
            _check_quantised_result(recipe, earlier[-1], path, model, problems)
            continue
        if len(ways) != 1:
            given = f"not {listed(ways)}" if ways else "it has none of them"
            problems.add_check(path, f"a model needs exactly one of path, stage and config; {given}")
            continue
        if model.stage is not None and model.stage not in earlier:
            problems.add_check(path, _why_not_earlier(model.stage, name, names, earlier))
        elif model.stage is not None:
            _check_quantised_result(recipe, model.stage, path, model, problems)
        if model.path is not None:
            _check_exists(model.path, path, (), problems)
            if not model.path:
                problems.add_check(path, "the path of the model is empty")
        if model.config is not None:
            _check_config(model, path, problems)
        if model.revision is not None and model.path is None:
            problems.add_check((*path, "revision"), "only a model with a `path` has a revision")


def _check_quantised_result(recipe: Recipe, origin: str, path: Path, model: ModelSpec, problems: Problems) -> None:
    """The result of an earlier stage cannot be quantised where it is an adapter."""
    stage = recipe.stages[origin]
    if model.quantization is not None and is_lora(stage) and not (stage.lora is not None and stage.lora.merge):
        problems.add_check(
            (*path, "quantization"),
            f"the result of stage {origin!r} is an adapter, which is merged into its 16-bit base; name it as "
            f"{{adapter: stage:{origin}}} to run it on a quantized base, or set `lora.merge: true` in stage {origin!r}",
        )


def _check_adapter_of(recipe: Recipe, name: str, path: Path, model: ModelSpec, problems: Problems) -> None:
    names = list(recipe.stages)
    earlier = names[: names.index(name)]
    origin = adapter_stage(model.adapter)
    if origin is not None and (origin not in earlier or recipe.stages[origin] is None):
        problems.add_check((*path, "adapter"), _why_not_earlier(origin, name, names, earlier))
    else:
        check_adapter(recipe, name, path, model, problems)


def _why_not_earlier(wanted: str, name: str, names: list[str], earlier: list[str]) -> str:
    if wanted == name:
        return f"the stage {name!r} refers to its own result; it can start from an earlier one only"
    if wanted in names:
        return f"the stage {wanted!r} runs after {name!r}; stages run in the order of the file"
    return f"there is no stage {wanted!r} (earlier ones: {listed(earlier)}){nearest(wanted, earlier)}"


def _check_config(model: ModelSpec, path: Path, problems: Problems) -> None:
    if not isinstance((model.config or {}).get("model_type"), str):
        message = "a model from a config needs its `model_type` (mistral, mixtral, llama...)"
        problems.add_check((*path, "config", "model_type"), message)
    if model.quantization is not None:
        message = f"random weights cannot be quantized; remove `quantization: {model.quantization}`"
        problems.add_check((*path, "quantization"), message)


# ---- tokenizer and report --------------------------------------------------------------------------------------------


def _check_tokenizer(recipe: Recipe, problems: Problems) -> None:
    spec = recipe.tokenizer
    if spec is None:
        stages = [(name, stage) for name, stage in (recipe.stages or {}).items() if stage is not None]
        for name, stage in stages:
            for path, model in models_of_stage(name, stage):
                if model.config is not None:
                    message = "a model from a config has no tokenizer; give `tokenizer: PATH` or `tokenizer: {train: ...}`"
                    problems.add_check((*path, "config"), message)
        return
    _check_tokenizer_spec(spec, recipe, problems)


def _check_tokenizer_spec(spec: TokenizerSpec, recipe: Recipe, problems: Problems) -> None:
    path: Path = ("tokenizer",)
    if (spec.path is None) == (spec.train is None):
        problems.add_check(path, "needs exactly one of path and train")
    if spec.path is not None:
        _check_exists(spec.path, (*path, "path"), (".json", ".model"), problems)
    if spec.train is not None:
        _positive(spec.train, ("vocab_size",), (*path, "train"), problems)
        _check_known(spec.train.sources, recipe.sources, "source", (*path, "train", "sources"), problems)


def _check_known(names: Iterable[str], known: Iterable[str] | None, noun: str, path: Path, problems: Problems) -> None:
    if known is None:  # it could not be read
        return
    known = list(known)
    for name in names:
        if name not in known:
            problems.add_check(path, f"there is no {noun} {name!r} (there are: {listed(known)}){nearest(name, known)}")


def _check_evaluation(recipe: Recipe, spec: EvaluationSpec, problems: Problems) -> None:
    path: Path = ("evaluation",)
    _check_known(spec.models, recipe.stages, "stage", (*path, "models"), problems)
    _check_known(spec.sources, recipe.sources, "source", (*path, "sources"), problems)
    if spec.baseline is not None:
        _check_known([spec.baseline], spec.models or recipe.stages, "evaluated stage", (*path, "baseline"), problems)
    _positive(spec, ("limit", "max_new_tokens", "batch_size", "bootstrap"), path, problems)
    without = [
        name
        for name, source in (recipe.sources or {}).items()
        if source is not None and not (source.validation or source.validation_split or source.holdout)
    ]
    remedy = "give `validation`, `validation_split` or `holdout`"
    for name in spec.sources:
        if name in without:
            problems.add_check((*path, "sources"), f"the source {name!r} has no validation rows; {remedy} there")
    _check_suites(recipe, spec, (*path, "suites"), problems)
    if not spec.sources and not spec.suites and recipe.sources and len(without) == len(recipe.sources):
        problems.add_check(path, f"no source has validation rows to evaluate on; {remedy} of a source")


def _check_suites(recipe: Recipe, spec: EvaluationSpec, path: Path, problems: Problems) -> None:
    names: dict[str, int] = {}
    for index, file in enumerate(spec.suites):
        try:
            suite = load_suite(file, need_models=False)
        except UserError as error:
            problems.add_check((*path, index), " ".join(str(error).split()))
            continue
        models = [*(spec.models or recipe.stages), *suite.models]
        twice = [name for name in suite.models if name in (spec.models or recipe.stages)]
        if twice:
            problems.add_check((*path, index), f"{file} names a model {twice[0]!r} as a stage is named; rename it there")
        if suite.baseline is not None and suite.baseline not in models:
            problems.add_check((*path, index), f"the baseline of {file}, {suite.baseline!r}, is none of {listed(models)}")
        if names.setdefault(suite.name, index) != index:
            problems.add_check((*path, index), f"two suites are named {suite.name!r}, and would write into one folder")
