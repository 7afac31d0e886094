"""What no part of a recipe can say of itself: its stages, sources, models and report checked against each other.

Every check tells what it finds, so that all errors are told at once. A value that could not be read is None or its default
here; whatever would only follow from that is dropped by ``Errors.add_check``.
"""

from __future__ import annotations

from collections.abc import Iterator

from daekit.errors import UserError, listed, nearest
from daekit.recipe.adapter_config import (
    BARE_BASE,
    adapter_stage,
    read_adapter_config,
    require_same_base,
    require_shareable,
)
from daekit.recipe.generated import GeneratedSpec
from daekit.recipe.model import ModelSpec
from daekit.recipe.rows import NO_VALIDATION
from daekit.recipe.schema import STUDENT_AS_IT_WAS, DAEStage, EvaluatedModel, EvaluationSpec, KDStage, Recipe, StageSpec
from daekit.recipe.tree import KeyPath
from daekit.recipe.validation import Errors, Problems, bad_directory, bad_name, dotted, unknown


def check_recipe(recipe: Recipe, errors: Errors) -> None:
    """Note everything in ``recipe`` that contradicts itself, refers to nothing, or cannot be trained."""
    errors.add_all(bad_directory("output_dir", recipe.output_dir))
    for name in recipe.sources or ():
        errors.add_all(bad_name(("sources", name), name))
        if name in ("sources", "rows"):
            errors.add_check(("sources", name), "this name is taken by the long form of `data`; choose another")
    for name, source in (recipe.sources or {}).items():
        if source is not None and source.generated is not None:
            errors.add_all(_of_generated(recipe, name, source.generated), ("sources", name, "generated"))
    for name, stage in (recipe.stages or {}).items():
        errors.add_all(bad_name(("stages", name), name))
        if name == STUDENT_AS_IT_WAS:
            errors.add_check(("stages", name), "this name is taken by `evaluation.models`; choose another")
        if stage is not None:
            errors.add_all(_of_stage(recipe, name, stage), ("stages", name))
    if recipe.tokenizer is None and not errors.is_unread(("tokenizer",)):
        message = "a model from a config has no tokenizer; give `tokenizer: PATH` or `tokenizer: {train: ...}`"
        for name, stage in (recipe.stages or {}).items():
            for path, model in stage.models().items() if stage is not None else ():
                if model.config is not None:
                    errors.add_check(("stages", name, *path, "config"), message)
    elif recipe.tokenizer is not None and recipe.tokenizer.train is not None:
        train: KeyPath = ("tokenizer", "train", "sources")
        errors.add_all(unknown(train, recipe.tokenizer.train.sources, recipe.sources, "source"))
        for name in recipe.tokenizer.train.sources:
            if (named := recipe.sources.get(name)) is not None and named.generated is not None:
                errors.add_check(train, f"the rows of {name!r} are not written yet when the tokenizer is trained; leave it out")
    if recipe.evaluation is not None:
        errors.add_all(_of_evaluation(recipe, recipe.evaluation), ("evaluation",))
        for index, suite in enumerate(recipe.evaluation.suites):
            if suite is not None:
                names = recipe.evaluation.names or evaluated_by_default(recipe)
                errors.add_all(suite.contradictions(names, recipe.evaluation.baseline), ("evaluation", "suites", index))


def _of_generated(recipe: Recipe, name: str, spec: GeneratedSpec) -> Problems:
    """What is wrong with rows that a model writes: prompts from nowhere, a model that is not there, or comes too late."""
    model, stages = spec.model, list(recipe.stages or {})
    if spec.prompts is not None and spec.prompts.source is not None:
        others = [other for other, source in recipe.sources.items() if source is not None and source.generated is None]
        yield from unknown(("prompts", "source"), [spec.prompts.source], others, "source that is not generated")
    if model is None or model.url is not None or model.init is not None or model.config is not None:
        return
    if model.adapter is None:
        yield from of_origin(recipe, model, ("model",), stages, None)
    for origin in spec.stages():
        if model.adapter is not None:
            yield from unknown(("model", "adapter"), [origin], stages, "stage")
        for user, stage in (recipe.stages or {}).items():
            made = stage.student.init if stage is not None and stage.student is not None else None
            used = stage is not None and stage.data is not None and name in (stage.data.sources or ())
            used = used or (made is not None and name in made.calibration.sources)
            if used and origin in stages and stages.index(origin) >= stages.index(user):
                yield (
                    "model",
                    f"stage {user!r} uses this source, and {origin!r} is not complete then; name an earlier stage",
                )


# ---- stages ----------------------------------------------------------------------------------------------------------


def _of_stage(recipe: Recipe, name: str, stage: StageSpec) -> Problems:
    earlier = recipe.earlier_stages(name)
    if stage.student is None and not earlier:
        yield "student", "the first stage has no stage before it to take the student from; give a path, a config or `from`"
    for path, model in stage.models().items():
        if model.adapter is not None and path != ("student", "from") and path[:2] != ("student", "with"):
            for message in _of_adapter(recipe, name, model):
                yield (*path, "adapter"), message
        student = model is stage.student
        alone = model.path is None and model.stage is None and model.config is None
        if model.init is not None or (model.adapter is not None and (alone or not student)):
            continue
        if student and alone and earlier:  # the result of the stage before, loaded as the other keys say
            yield from _of_quantised_result(recipe, earlier[-1], path, model)
        else:
            yield from of_origin(recipe, model, path, earlier, name)
    if stage.data is not None:
        for source in stage.data.sources or ():
            yield from unknown(("data", source) if stage.data.weights else "data", [source], recipe.sources, "source")
    if stage.student is not None and stage.student.init is not None:
        calibration = stage.student.init.calibration.sources
        yield from unknown(("student", "calibration", "sources"), calibration, recipe.sources, "source")
    names = stage.data.sources or () if stage.data is not None else ()
    rows = [recipe.sources.get(source) for source in names] if recipe.sources else []
    # with an unknown source, or one that could not be read, nobody knows which domains have rows
    known = [source for source in rows if source is not None and source.domain is not None]
    complete = len(rows) > 0 and len(known) == len(rows)
    if isinstance(stage, KDStage | DAEStage) and stage.select is not None and complete:
        watched = {source.domain for source in known if source.has_validation}
        yield from ((("select", *key), message) for key, message in stage.select.unwatched(watched))
    if isinstance(stage, DAEStage) and stage.data is not None and stage.teachers:
        yield from _of_domains(stage, {source.domain for source in known}, complete)


def of_origin(recipe: Recipe, model: ModelSpec, path: KeyPath, earlier: list[str], name: str | None) -> Problems:
    """What is wrong with where a whole model comes from.

    Args:
        recipe: the recipe that names it.
        model: the model.
        path: its key path.
        earlier: the stages that it may be a result of.
        name: the stage that names it; None: the report.
    """
    own = model.changed("path", "stage", "config")
    if len(own) != 1:
        given = f"not {listed(own)}" if own else "it has none of them"
        yield path, f"a model needs exactly one of path, stage and config; {given}"
    elif model.stage is not None and model.stage not in earlier:
        yield path, _why_not_earlier(model.stage, name, list(recipe.stages), earlier)
    elif model.stage is not None:
        yield from _of_quantised_result(recipe, model.stage, path, model)


def _of_quantised_result(recipe: Recipe, origin: str, path: KeyPath, model: ModelSpec) -> Problems:
    """The result of an earlier stage cannot be quantised where it is an adapter."""
    stage = recipe.stages[origin]
    if model.quantization is not None and stage is not None and stage.is_lora and not (stage.lora and stage.lora.merge):
        yield (
            (*path, "quantization"),
            f"the result of stage {origin!r} is an adapter, which is merged into its 16-bit base; set `lora.merge`, or name "
            f"it as {{adapter: stage:{origin}}} to run it on a quantized base",
        )


def _why_not_earlier(wanted: str, name: str | None, names: list[str], earlier: list[str]) -> str:
    if wanted == name:
        return f"the stage {name!r} refers to its own result; it can start from an earlier one only"
    if wanted in names:
        return f"the stage {wanted!r} runs after {name!r}; stages run in the order of the file"
    form = "; a checkpoint is written stage:NAME@checkpoint-40" if "@" in wanted else ""
    return f"there is no stage {wanted!r} (earlier ones: {listed(earlier)}){nearest(wanted, earlier)}{form}"


def _of_adapter(recipe: Recipe, name: str, model: ModelSpec) -> Iterator[str]:
    """What is wrong with the ``adapter`` of a model of stage ``name``: it is none, or one on another base."""
    origin, earlier, ours = adapter_stage(model.adapter), recipe.earlier_stages(name), recipe.base_of(name)
    if origin is not None and origin not in earlier:
        yield _why_not_earlier(origin, name, list(recipe.stages), earlier)
    elif origin is not None and recipe.stages[origin] is not None:
        theirs = recipe.base_of(origin)
        if not recipe.stages[origin].is_lora:
            yield f"the stage {origin!r} trains no LoRA adapter; name its result itself: `stage:{origin}`"
        elif ours is not None and theirs is not None and not ours.may_be(theirs):
            yield (
                f"the stage {origin!r} trains an adapter of {_name(theirs)}, not of this student's base {_name(ours)}; give "
                "both stages the same base"
            )
    elif origin is None and model.adapter is not None and model.adapter != BARE_BASE:
        try:
            config = read_adapter_config(model.adapter)
            require_shareable(model.adapter, config)
            if ours is not None and ours.path is not None:
                revisions = (config.get("revision"), ours.revision)
                require_same_base(model.adapter, config["base_model_name_or_path"], ours.path, revisions)
        except UserError as error:
            yield str(error)


def _of_domains(stage: DAEStage, domains: set[str], complete: bool) -> Problems:
    """Each domain of the rows has exactly one teacher; each teacher has rows. A typo must never follow the reference."""
    covered = [*stage.teachers, *stage.reference_domains]
    for domain in sorted(domains.difference(covered)):
        otherwise = f"name one here, or list the domain under reference_domains (now: {listed(stage.reference_domains)})"
        yield ("teachers", domain), f"the rows of domain {domain!r} have no teacher{nearest(domain, covered)}; {otherwise}"
    named = [domain for domain in stage.reference_domains if stage.changed("reference_domains")]
    for domain in [domain for domain in covered if domain not in domains and complete]:
        have = f"{listed(sorted(domains))}){nearest(domain, domains)}"
        nowhere = f"no source of this stage has the domain {domain!r} (they have: {have}"
        if domain in stage.teachers and domain not in stage.reference_domains:
            yield ("teachers", domain), f"a teacher without rows: {nowhere}"
        elif domain in named:
            yield "reference_domains", nowhere


# ---- the report ------------------------------------------------------------------------------------------------------


def evaluated_by_default(recipe: Recipe) -> list[str]:
    """The models of a report that names none: the first student as it was, if it is loaded from a path, and every stage."""
    stages = recipe.stages or {}
    first = next(iter(stages.values()), None)
    loaded = first is not None and first.student is not None and first.student.path is not None
    return [*([STUDENT_AS_IT_WAS] if loaded else []), *stages]


def _of_evaluation(recipe: Recipe, spec: EvaluationSpec) -> Problems:
    for index, model in enumerate(spec.models):
        if model is not None and model.name is not None:
            yield from _of_evaluated(recipe, model, ("models", index), bool(spec.suites))
    names = [*spec.names] or evaluated_by_default(recipe)
    for name in {name for name in names if names.count(name) > 1}:
        yield "models", f"two models are named {name!r}; give one another name: {{name: NAME, path: PATH}}"
    yield from unknown("sources", spec.sources, recipe.sources, "source")
    if spec.baseline is not None and recipe.stages is not None:
        yield from unknown("baseline", [spec.baseline], names, "evaluated stage")
    without = [name for name, source in (recipe.sources or {}).items() if source is not None and not source.has_validation]
    for name in [name for name in spec.sources if name in without]:
        yield "sources", f"the source {name!r} has no validation rows; {NO_VALIDATION} there"
    if not spec.sources and not spec.suites and recipe.sources and len(without) == len(recipe.sources):
        yield (), f"no source has validation rows to evaluate on; {NO_VALIDATION} of a source"
    seen: dict[str, int] = {}
    for index, suite in enumerate(spec.suites):
        if suite is not None and suite.name is not None and seen.setdefault(suite.name, index) != index:
            yield ("suites", index), f"two suites are named {suite.name!r}, and would write into one folder"


def _of_evaluated(recipe: Recipe, model: EvaluatedModel, path: KeyPath, in_suites: bool) -> Problems:
    stages = list(recipe.stages or {})
    if model.name == model.stage and model.name not in stages:
        known = [*stages, STUDENT_AS_IT_WAS]
        yield from unknown("models", [model.name], known if recipe.stages is not None else None, "stage")
    elif model.name == STUDENT_AS_IT_WAS:
        first = next(iter((recipe.stages or {}).values()), None)
        if in_suites and first is not None and first.student is not None and first.student.config is not None:
            yield path, "was made from a config: it lies in no directory where a suite could measure it"
    else:
        yield from bad_name(path, model.name, dots=True)
        if model.adapter is not None or model.init is not None or model.device_map is not None:
            yield path, "is measured as a whole model; give its path or a stage"
        elif model.config is not None:
            yield path, "random weights are not worth measuring; give a path or a stage"
        elif recipe.stages is not None:
            yield from of_origin(recipe, model, path, stages, None)


# ---- notes -----------------------------------------------------------------------------------------------------------


def sharing_notes(recipe: Recipe) -> list[str]:
    """What a resolved recipe does that its author may not want: a base loaded twice, an adapter on another precision."""
    notes = []
    for name, stage in recipe.stages.items():
        base = recipe.base_of(name) if stage.is_lora else None
        for key, teacher in stage.teachers_by_key().items():
            model = teacher.model
            origin = None if model is None else adapter_stage(model.adapter) or model.stage
            theirs = recipe.base_of(origin) if origin is not None and recipe.stages[origin].is_lora else None
            if model is None or base is None or theirs is None or not base.may_be(theirs):
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


def _precision(base: ModelSpec) -> str:
    return f"in {base.quantization}" if base.quantization else "without quantization"


def _name(base: ModelSpec) -> str:
    revision = f" (revision {base.revision})" if base.revision else ""
    return repr(base.path or (f"stage:{base.stage}" if base.stage else "a config")) + revision
