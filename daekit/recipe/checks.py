"""What the types cannot say: the parts of a recipe checked against each other.

Every check notes what it finds, so that all errors are told at once. A value that could not be read is None or its default
here; whatever would only follow from that is dropped by ``Errors.add_check``.
"""

from __future__ import annotations

from daekit.errors import listed, nearest
from daekit.recipe.check_caches import check_cache, check_served
from daekit.recipe.check_generated import check_generated
from daekit.recipe.check_models import check_models, check_origin, models_of_stage
from daekit.recipe.check_suite import check_suite
from daekit.recipe.model import TeacherSpec
from daekit.recipe.objective import Objective
from daekit.recipe.paths import check_exists, check_known, check_name, check_output_dir, exists
from daekit.recipe.schema import (
    BUILTIN_CORPORA,
    STUDENT_AS_IT_WAS,
    DAEStage,
    EvaluationSpec,
    MixtureSpec,
    Recipe,
    SFTStage,
    SourceSpec,
    StageSpec,
)
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors, dotted

# These would be read as keys of the long form of a mixture.
_RESERVED_SOURCES = ("sources", "rows")
_BUILTIN_SPLITS = ("train", "validation")
_USUAL_SPLITS = ("train", "validation", "test")
_SUM_TOLERANCE = 1e-6
_NO_ROWS = "give `validation`, `validation_split` or `holdout`"


def check_recipe(recipe: Recipe, errors: Errors) -> None:
    """Note everything in ``recipe`` that contradicts itself, refers to nothing, or cannot be trained."""
    check_output_dir(recipe.output_dir or "", ("output_dir",), errors)
    for name, source in (recipe.sources or {}).items():
        check_name(name, ("sources", name), errors)
        if name in _RESERVED_SOURCES:
            errors.add_check(("sources", name), "this name is taken by the long form of `data`; choose another")
        if source is not None:
            _check_source(source, ("sources", name), errors)
            _check_origin_of_rows(recipe, name, source, ("sources", name), errors)
    if not recipe.sources:
        errors.add_check(("sources",), "must name at least one source of rows")
    if not recipe.stages:
        errors.add_check(("stages",), "must name at least one stage")
    for name, stage in (recipe.stages or {}).items():
        check_name(name, ("stages", name), errors)
        if name == STUDENT_AS_IT_WAS:
            errors.add_check(("stages", name), "this name is taken by `evaluation.models`; choose another")
        if stage is not None:
            check_models(recipe, name, stage, errors)
            _check_stage(recipe, stage, ("stages", name), errors)
    _check_tokenizer(recipe, errors)
    if recipe.evaluation:
        _check_evaluation(recipe, recipe.evaluation, ("evaluation",), errors)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _check_source(source: SourceSpec, path: Path, errors: Errors) -> None:
    if source.domain is not None:
        check_name(source.domain, (*path, "domain"), errors, "domain")
    for key in ("path", "validation"):
        _check_rows_path(getattr(source, key), (*path, key), errors)
    if source.path is not None:
        _check_split(source.path, source.split, (*path, "split"), errors)
        if source.validation_split is not None:
            _check_split(source.path, source.validation_split, (*path, "validation_split"), errors)
    ways = [key for key in ("validation", "validation_split", "holdout") if getattr(source, key) is not None]
    if len(ways) > 1:
        errors.add_check((*path, ways[-1]), f"{listed(ways)} exclude each other; set all but one to null (or leave them out)")
    if not ways and source.validation_limit is not None:
        errors.add_check((*path, "validation_limit"), f"there are no validation rows to limit; {_NO_ROWS}")


def _check_origin_of_rows(recipe: Recipe, name: str, source: SourceSpec, path: Path, errors: Errors) -> None:
    """Rows lie at a path, or a model writes them; both have not the same keys."""
    if source.generated is None:
        if source.path is None:
            errors.add_check(path, "has no rows: give `path`, or `generated` for rows that a model writes")
        return
    if source.path is not None:
        errors.add_check((*path, "generated"), "excludes `path`: rows lie there, or a model writes them")
    for key in ("split", "name", "revision", "validation_split", "columns", "chat"):
        if source.changed(key):
            errors.add_check((*path, key), "belongs to `path`; the rows of `generated` are as its prompts are")
    check_generated(recipe, name, source.generated, (*path, "generated"), errors)


def _check_rows_path(value: str | None, path: Path, errors: Errors) -> None:
    if value is not None and value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in BUILTIN_CORPORA:
            hint = nearest(name, BUILTIN_CORPORA)
            errors.add_check(path, f"{value!r} is not an embedded corpus ({listed(BUILTIN_CORPORA)}){hint}")
    else:
        check_exists(value, path, errors)


def _check_split(rows: str, split: str, path: Path, errors: Errors) -> None:
    """What can be said of a split without opening anything; directories and data sets are asked before the first step."""
    if rows.startswith("builtin:"):
        if split not in _BUILTIN_SPLITS:
            message = f"{rows} has no split {split!r} (it has: {listed(_BUILTIN_SPLITS)}){nearest(split, _BUILTIN_SPLITS)}"
            errors.add_check(path, message)
    elif not exists(rows) and not any(usual in split for usual in _USUAL_SPLITS):
        # a data set on the hub may have any split; but one that is nearly a usual one is a typo
        letters = [usual for usual in _USUAL_SPLITS if sorted(usual) == sorted(split) or nearest(split, [usual])]
        if letters and abs(len(letters[0]) - len(split)) <= 1:
            errors.add_check(
                path, f"{split!r} is no usual split; did you mean {letters[0]!r}? (its rows are asked for on the hub)"
            )


def _check_mixture(recipe: Recipe, mixture: MixtureSpec, path: Path, errors: Errors) -> None:
    if not mixture.sources:
        errors.add_check(path, "must name at least one source")
    for source in mixture.sources:
        check_known([source], recipe.sources, "source", (*path, source) if errors.given((*path, source)) else path, errors)
        if mixture.sources.count(source) > 1:
            errors.add_check(path, f"the source {source!r} is listed twice; give it a weight instead")
            break
    for source, weight in zip(mixture.sources, mixture.weights, strict=bool(mixture.weights)):
        if weight <= 0:
            errors.add_check(path, f"the weight of {source!r} is {weight}, must be greater than 0; or leave the source out")
    if mixture.rows is not None and not mixture.weights:
        message = (
            "rows belongs to a weighted mixture ({sources: {a: 0.25, b: 0.75}, rows: N}); "
            "to use fewer rows of a source set its `limit`"
        )
        errors.add_check((*path, "rows"), message)


# ---- stages ----------------------------------------------------------------------------------------------------------


def _check_stage(recipe: Recipe, stage: StageSpec, path: Path, errors: Errors) -> None:
    """Note everything in one stage that cannot be trained as it is written."""
    if stage.data is not None and stage.data.sources is not None:
        _check_mixture(recipe, stage.data, (*path, "data"), errors)
    if isinstance(stage, DAEStage):
        _check_domains(recipe, stage, path, errors)
    if not isinstance(stage, SFTStage):
        _check_loss(stage.loss, stage, (*path, "loss"), errors)
        check_served(stage, path, errors)
    for key, teacher in stage.teachers_by_key().items():
        _check_teacher(teacher, (*path, *key), errors)
    student = stage.student
    if student is not None and student.quantization is not None and stage.lora is None and student.adapter is None:
        message = (
            f"a student in {student.quantization} cannot be trained itself; "
            "add `lora` to train an adapter on it (QLoRA), or remove the quantization"
        )
        errors.add_check((*path, "student", "quantization"), message)
    if stage.lora is not None and student is not None and student.config is not None and student.quantization is None:
        message = "a student made from a config has random weights, which an adapter cannot make up for; remove it"
        errors.add_check((*path, "lora"), message)


def _check_domains(recipe: Recipe, stage: DAEStage, path: Path, errors: Errors) -> None:
    """Each domain of the rows has exactly one teacher; each teacher has rows. A typo must never follow the reference."""
    if not stage.teachers:
        errors.add_check((*path, "teachers"), "a dae stage needs a teacher per domain: `teachers: {DOMAIN: MODEL}`")
    if stage.data is None or stage.data.sources is None:
        return
    rows = [recipe.sources.get(source) for source in stage.data.sources] if recipe.sources else []
    domains = {source.domain for source in rows if source is not None and source.domain is not None}
    # With an unknown source, or one that could not be read, nobody knows which domains have rows.
    complete = len(rows) > 0 and all(source is not None and source.domain is not None for source in rows)
    covered = [*(stage.teachers or ()), *stage.reference_domains]
    for domain in sorted(domains.difference(covered)) if stage.teachers else ():
        message = (
            f"the rows of domain {domain!r} have no teacher{nearest(domain, covered)}; name one here, or list the domain "
            f"under reference_domains (now: {listed(stage.reference_domains)})"
        )
        errors.add_check((*path, "teachers", domain), message)
    for domain in stage.teachers or ():
        if domain in stage.reference_domains:
            message = f"the domain {domain!r} is also in reference_domains; its rows can follow only one of them"
            errors.add_check((*path, "teachers", domain), message)
        elif complete and domain not in domains:
            errors.add_check((*path, "teachers", domain), f"a teacher without rows: {_nowhere(domain, domains)}")
    for domain in stage.reference_domains if complete and stage.changed("reference_domains") else ():
        if domain not in domains:
            errors.add_check((*path, "reference_domains"), _nowhere(domain, domains))


def _nowhere(domain: str, domains: set[str]) -> str:
    have = listed(sorted(domains))
    return f"no source of this stage has the domain {domain!r} (they have: {have}){nearest(domain, domains)}"


def _check_loss(loss: Objective, stage: StageSpec, path: Path, errors: Errors) -> None:
    """Settings that would do nothing, and losses on what an ensemble does not have."""
    belongs = {"beta": ("jsd",), "skew_alpha": ("skew_kl", "skew_reverse_kl")}
    for key, divergences in belongs.items():
        if loss.divergence not in divergences and loss.changed(key):
            message = f"{key} belongs to divergence: {' or '.join(divergences)}, not to {loss.divergence}"
            errors.add_check((*path, key), message)
    for key in ("max_new_tokens", "rollout_temperature", "rollout_buffer"):
        if not loss.on_policy and loss.changed(key):
            errors.add_check((*path, key), "belongs to on_policy, which is 0: it would do nothing")
    if loss.on_policy:
        _check_on_policy(loss, stage, path, errors)
    ensembles = [key for key, teacher in stage.teachers_by_key().items() if teacher.ensemble]
    for kind, options in {"attention": ("layers", "relation_heads"), "hidden": ("layers", "loss")}.items():
        weight = f"{kind}_weight"
        for key in [f"{kind}_{option}" for option in options]:
            if not getattr(loss, weight) and loss.changed(key):
                errors.add_check((*path, key), f"belongs to {weight}, which is 0: it would do nothing")
        if getattr(loss, weight) and ensembles:
            message = (
                f"an ensemble has no attention or hidden states of its own; set {weight} to 0, or "
                f"`{dotted((*path[:-1], *ensembles[0]))}` to one model"
            )
            errors.add_check((*path, weight), message)


def _check_on_policy(loss: Objective, stage: StageSpec, path: Path, errors: Errors) -> None:
    """What the trainer would refuse of rows that the student writes itself, and can be told from the recipe."""
    options, keys = stage.trainer, (*path[:-1], "trainer")
    if options.get("packing"):
        message = (
            "lays rows into blocks before the student has written their responses; set padding_free, or loss.on_policy to 0"
        )
        errors.add_check((*keys, "packing"), message)
    length = options.get("max_length")
    if isinstance(length, int) and loss.max_new_tokens is not None and loss.max_new_tokens >= length:
        errors.add_check(
            (*path, "max_new_tokens"), f"leaves no room for a prompt within trainer.max_length: {length}; lower it"
        )


def _check_teacher(teacher: TeacherSpec, path: Path, errors: Errors) -> None:
    check_cache(teacher, path, errors)
    kinds = [teacher.model is not None, bool(teacher.ensemble), teacher.server is not None, teacher.labels]
    if sum(kinds) != 1 and not (teacher.is_student and teacher.cache is not None and path[-1] == "reference"):
        errors.add_check(path, "a teacher is exactly one of a model, an ensemble, a served model and labels")
    elif not teacher.ensemble:
        if teacher.changed("average"):
            errors.add_check((*path, "average"), "only an ensemble is averaged")
    else:
        weights = [member.weight for member in teacher.ensemble if member is not None and member.weight is not None]
        shown = listed(str(weight) for weight in weights)
        if any(weight <= 0 for weight in weights):
            errors.add_check((*path, "ensemble"), f"the weights {shown} must be greater than 0")
        elif abs(sum(weights) - 1) > _SUM_TOLERANCE:
            errors.add_check((*path, "ensemble"), f"the weights {shown} sum to {sum(weights):.6g}, must sum to 1")


# ---- tokenizer and report --------------------------------------------------------------------------------------------


def _check_tokenizer(recipe: Recipe, errors: Errors) -> None:
    spec, path = recipe.tokenizer, ("tokenizer",)
    if spec is None:
        for name, stage in (recipe.stages or {}).items():
            for where, model in models_of_stage(name, stage) if stage is not None else ():
                if model.config is not None and not errors.is_unread(path):
                    message = "a model from a config has no tokenizer; give `tokenizer: PATH` or `tokenizer: {train: ...}`"
                    errors.add_check((*where, "config"), message)
        return
    if (spec.path is None) == (spec.train is None):
        errors.add_check(path, "needs exactly one of path and train")
    check_exists(spec.path, (*path, "path"), errors, suffixes=(".json", ".model"))
    if spec.train is not None:
        check_known(spec.train.sources, recipe.sources, "source", (*path, "train", "sources"), errors)
        written = [name for name in spec.train.sources if recipe.sources.get(name) and recipe.sources[name].generated]
        if written:
            message = f"the rows of {written[0]!r} are not written yet when the tokenizer is trained; leave it out"
            errors.add_check((*path, "train", "sources"), message)


def evaluated_by_default(recipe: Recipe) -> list[str]:
    """The models of a report that names none: the first student as it was, if it is loaded from a path, and every stage."""
    stages = recipe.stages or {}
    first = next(iter(stages.values()), None)
    loaded = first is not None and first.student is not None and first.student.path is not None
    return [*([STUDENT_AS_IT_WAS] if loaded else []), *stages]


def _check_evaluation(recipe: Recipe, spec: EvaluationSpec, path: Path, errors: Errors) -> None:
    stages = list(recipe.stages or {})
    for index, model in enumerate(spec.models):
        if model is None or model.name is None:
            continue
        where: Path = (*path, "models", index)
        if model.name == model.stage and model.name not in stages:
            known = [*stages, STUDENT_AS_IT_WAS]
            check_known([model.name], known if recipe.stages is not None else None, "stage", (*path, "models"), errors)
        elif model.name == STUDENT_AS_IT_WAS:
            first = next(iter(stages), "")
            student = recipe.stages[first].student if first and recipe.stages[first] is not None else None
            if spec.suites and student is not None and student.config is not None:
                errors.add_check(where, "was made from a config: it lies in no directory where a suite could measure it")
        else:
            check_name(model.name, where, errors, dots=True)
            if model.adapter is not None or model.init is not None or model.device_map is not None:
                errors.add_check(where, "is measured as a whole model; give its path or a stage")
            elif model.config is not None:
                errors.add_check(where, "random weights are not worth measuring; give a path or a stage")
            elif not errors.is_unread(("stages",)):
                check_origin(recipe, model, where, errors, stages, stages, None)
    names = [model.name for model in spec.models if model is not None and model.name is not None] or evaluated_by_default(
        recipe
    )
    for name in {name for name in names if names.count(name) > 1}:
        errors.add_check((*path, "models"), f"two models are named {name!r}; give one another name: {{name: NAME, path: PATH}}")
    check_known(spec.sources, recipe.sources, "source", (*path, "sources"), errors)
    if spec.baseline is not None and recipe.stages is not None:
        check_known([spec.baseline], names, "evaluated stage", (*path, "baseline"), errors)
    without = [name for name, source in (recipe.sources or {}).items() if source is not None and not source.has_validation]
    for name in spec.sources:
        if name in without:
            errors.add_check((*path, "sources"), f"the source {name!r} has no validation rows; {_NO_ROWS} there")
    _check_suites(spec, names, (*path, "suites"), errors)
    if not spec.sources and not spec.suites and recipe.sources and len(without) == len(recipe.sources):
        errors.add_check(path, f"no source has validation rows to evaluate on; {_NO_ROWS} of a source")


def _check_suites(spec: EvaluationSpec, models: list[str], path: Path, errors: Errors) -> None:
    """Each suite measures the recipe's models and its own; its baseline may be any of them."""
    names: dict[str, int] = {}
    for index, suite in enumerate(spec.suites):
        if suite is None:
            continue
        twice = [name for name in suite.models or {} if name in models]
        if twice:
            errors.add_check(
                (*path, index, "models", twice[0]), f"the recipe has a model {twice[0]!r}, too; rename one of them"
            )
        check_suite(suite, errors, models, (*path, index), inherited=spec.baseline)
        if suite.name is not None and names.setdefault(suite.name, index) != index:
            errors.add_check((*path, index), f"two suites are named {suite.name!r}, and would write into one folder")
