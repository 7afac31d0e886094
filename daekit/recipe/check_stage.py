"""Checks of one stage: what its type needs, which teacher speaks for which domain, its loss, adapter and rows."""

from __future__ import annotations

import re
from collections.abc import Iterator

from daekit.recipe.problems import Problems, listed, nearest
from daekit.recipe.schema import LossSpec, MixtureSpec, Recipe, StageSpec, TeacherSpec
from daekit.recipe.tree import Path

# Keys that a stage of this type has no use for, and where they belong.
_FOREIGN = {
    "sft": {
        "teacher": "an sft stage learns from the data alone; for a teacher use type: kd",
        "teachers": "an sft stage learns from the data alone; for teachers use type: dae",
        "reference": "an sft stage learns from the data alone; for a reference use type: dae",
        "reference_domains": "an sft stage has no reference; for one use type: dae",
        "loss": "an sft stage has the cross-entropy as its only loss; for others use type: kd or dae",
    },
    "kd": {
        "teachers": "a kd stage follows one `teacher` on all rows; for a teacher per domain use type: dae",
        "reference": "a kd stage has no reference; for one use type: dae",
        "reference_domains": "a kd stage has no reference; for one use type: dae",
    },
    "dae": {
        "teacher": "a dae stage names a teacher per domain: `teachers: {DOMAIN: MODEL}`",
    },
}
_WEIGHTS = ("ce_weight", "prediction_weight", "attention_weight", "hidden_weight")
_LAYERS = re.compile(r"^(uniform|last_[1-9]\d*)$")
_SUM_TOLERANCE = 1e-6
# Options of the trainer that it takes as they are and stumbles over later.
_POSITIVE = (
    "max_length",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")


def check_stage(recipe: Recipe, name: str, stage: StageSpec, problems: Problems) -> None:
    """Note everything in one stage that cannot be trained as it is written."""
    path: Path = ("stages", name)
    for key, message in _FOREIGN.get(stage.type, {}).items():
        if problems.given((*path, key)):
            problems.add_check((*path, key), message)
    if stage.seed is not None and stage.seed < 0:
        problems.add_check((*path, "seed"), f"{stage.seed} must not be negative")
    if stage.type == "kd" and stage.teacher is None:
        problems.add_check((*path, "teacher"), "a kd stage needs a teacher to follow: `teacher: MODEL`")
    if stage.data is not None:
        _check_mixture(recipe, stage.data, (*path, "data"), problems)
    if stage.type == "dae":
        _check_domains(recipe, stage, path, problems)
    if stage.type in ("kd", "dae"):
        _check_loss(stage, path, problems)
    for where, teacher in _teachers(stage, path):
        _check_teacher(teacher, where, problems)
    _check_adapter(stage, path, problems)
    _check_trainer(stage, (*path, "trainer"), problems)


def _check_mixture(recipe: Recipe, mixture: MixtureSpec, path: Path, problems: Problems) -> None:
    if not mixture.sources:
        problems.add_check(path, "must name at least one source")
    known = recipe.sources
    for source in mixture.sources:
        if known is not None and source not in known:
            where = path if not problems.given((*path, source)) else (*path, source)
            message = f"there is no source {source!r} (there are: {listed(known)}){nearest(source, known)}"
            problems.add_check(where, message)
        if mixture.sources.count(source) > 1:
            problems.add_check(path, f"the source {source!r} is listed twice; give it a weight instead")
            break
    for source, weight in zip(mixture.sources, mixture.weights, strict=bool(mixture.weights)):
        if weight <= 0:
            problems.add_check(path, f"the weight of {source!r} is {weight}, must be greater than 0; or leave the source out")
    if mixture.rows is not None and mixture.rows <= 0:
        problems.add_check((*path, "rows"), f"{mixture.rows} must be greater than 0")
    if mixture.rows is not None and not mixture.weights:
        message = (
            "rows belongs to a weighted mixture ({sources: {a: 0.25, b: 0.75}, rows: N}); "
            "to use fewer rows of a source set its `limit`"
        )
        problems.add_check((*path, "rows"), message)


def _check_domains(recipe: Recipe, stage: StageSpec, path: Path, problems: Problems) -> None:
    """Each domain of the rows has exactly one voice; each teacher has rows. A typo must never follow the reference."""
    if not stage.teachers:
        problems.add_check((*path, "teachers"), "a dae stage needs a teacher per domain: `teachers: {DOMAIN: MODEL}`")
    if stage.data is None:
        return
    rows = [recipe.sources.get(source) for source in stage.data.sources] if recipe.sources else []
    domains = {source.domain for source in rows if source is not None and source.domain is not None}
    # With an unknown source, or one that could not be read, nobody knows which domains have rows.
    complete = len(rows) > 0 and all(source is not None and source.domain is not None for source in rows)
    voices = [*stage.teachers, *stage.reference_domains]
    if stage.teachers:
        for domain in sorted(domains.difference(voices)):
            message = (
                f"the rows of domain {domain!r} have no teacher{nearest(domain, voices)}; name one here, or list the domain "
                f"under reference_domains (now: {listed(stage.reference_domains)})"
            )
            problems.add_check((*path, "teachers", domain), message)
    for domain in stage.teachers:
        if domain in stage.reference_domains:
            message = f"the domain {domain!r} is also in reference_domains; its rows can follow only one of them"
            problems.add_check((*path, "teachers", domain), message)
        elif complete and domain not in domains:
            problems.add_check((*path, "teachers", domain), f"a teacher without rows: {_nowhere(domain, domains)}")
    if complete and stage.reference_domains != StageSpec.reference_domains:
        for domain in stage.reference_domains:
            if domain not in domains:
                problems.add_check((*path, "reference_domains"), _nowhere(domain, domains))


def _nowhere(domain: str, domains: set[str]) -> str:
    have = listed(sorted(domains))
    return f"no source of this stage has the domain {domain!r} (they have: {have}){nearest(domain, domains)}"


def _check_loss(stage: StageSpec, path: Path, problems: Problems) -> None:
    loss: LossSpec = stage.loss
    where = (*path, "loss")
    weights = {key: getattr(loss, key) for key in _WEIGHTS}
    for key, weight in weights.items():
        if weight < 0:
            problems.add_check((*where, key), f"{weight} must not be negative")
    if not any(weights.values()):
        problems.add_check(where, f"{listed(_WEIGHTS)} are all 0: there is nothing to learn")
    if loss.temperature <= 0:
        problems.add_check((*where, "temperature"), f"{loss.temperature} must be greater than 0")
    if loss.divergence == "jsd" and not 0 < loss.beta < 1:
        message = f"{loss.beta} must lie between 0 and 1; for their limits choose forward_kl or reverse_kl"
        problems.add_check((*where, "beta"), message)
    if loss.divergence != "jsd" and loss.beta != LossSpec.beta:
        problems.add_check((*where, "beta"), f"beta belongs to divergence: jsd, not to {loss.divergence}")
    skewed = loss.divergence in ("skew_kl", "skew_reverse_kl")
    if skewed and not 0 <= loss.skew_alpha < 1:
        message = f"{loss.skew_alpha} must be at least 0 (the KL without skew) and below 1 (where the divergence is 0)"
        problems.add_check((*where, "skew_alpha"), message)
    if not skewed and loss.skew_alpha != LossSpec.skew_alpha:
        message = f"skew_alpha belongs to divergence: skew_kl or skew_reverse_kl, not to {loss.divergence}"
        problems.add_check((*where, "skew_alpha"), message)
    for kind in ("attention", "hidden"):
        _check_inside(stage, kind, where, problems)
    if loss.attention_relation_heads is not None and loss.attention_relation_heads < 1:
        problems.add_check((*where, "attention_relation_heads"), f"{loss.attention_relation_heads} must be at least 1")


def _check_inside(stage: StageSpec, kind: str, where: Path, problems: Problems) -> None:
    """A loss that looks inside its teachers: which layers, and that each row has one teacher to look into."""
    weight, layers = getattr(stage.loss, f"{kind}_weight"), getattr(stage.loss, f"{kind}_layers")
    if isinstance(layers, str) and not _LAYERS.match(layers):
        message = f"{layers!r} is unknown; choose uniform, last_K (last_4), or pairs [[student's layer, teacher's layer], ...]"
        problems.add_check((*where, f"{kind}_layers"), message)
    if not isinstance(layers, str) and (not layers or any(len(pair) != 2 or min(pair) < 0 for pair in layers)):
        problems.add_check((*where, f"{kind}_layers"), "wants pairs [student's layer, teacher's layer], counted from 0")
    options = {f"{kind}_layers"} | ({"attention_relation_heads"} if kind == "attention" else {"hidden_loss"})
    for key in sorted(options):
        if not weight and getattr(stage.loss, key) != getattr(LossSpec, key):
            problems.add_check((*where, key), f"belongs to {kind}_weight, which is 0: it would do nothing")
    ensembles = [path for path, teacher in _teachers(stage, where[:-1]) if teacher.ensemble]
    if weight > 0 and ensembles:
        message = (
            f"an ensemble has no attention or hidden states of its own; set {kind}_weight to 0, or `"
            f"{'.'.join(str(part) for part in ensembles[0])}` to one model"
        )
        problems.add_check((*where, f"{kind}_weight"), message)


def _teachers(stage: StageSpec, path: Path) -> Iterator[tuple[Path, TeacherSpec]]:
    if stage.teacher is not None:
        yield (*path, "teacher"), stage.teacher
    if stage.reference is not None:
        yield (*path, "reference"), stage.reference
    for domain, teacher in stage.teachers.items():
        if teacher is not None:
            yield (*path, "teachers", domain), teacher


def _check_teacher(teacher: TeacherSpec, path: Path, problems: Problems) -> None:
    if (teacher.model is None) == (not teacher.ensemble):
        problems.add_check(path, "a teacher is exactly one of a model and an ensemble")
        return
    if not teacher.ensemble:
        if teacher.average != TeacherSpec.average:
            problems.add_check((*path, "average"), "only an ensemble is averaged")
        return
    weights = [member.weight for member in teacher.ensemble]
    if any(weight is None for weight in weights):
        return
    if any(weight <= 0 for weight in weights):
        problems.add_check((*path, "ensemble"), f"the weights {listed(str(w) for w in weights)} must be greater than 0")
    elif abs(sum(weights) - 1) > _SUM_TOLERANCE:
        message = f"the weights {listed(str(w) for w in weights)} sum to {sum(weights):.6g}, must sum to 1"
        problems.add_check((*path, "ensemble"), message)


def _check_adapter(stage: StageSpec, path: Path, problems: Problems) -> None:
    lora, student = stage.lora, stage.student
    if student is not None and student.quantization is not None and lora is None and student.adapter is None:
        message = (
            f"a student in {student.quantization} cannot be trained itself; "
            "add `lora` to train an adapter on it (QLoRA), or remove the quantization"
        )
        problems.add_check((*path, "student", "quantization"), message)
    if lora is None:
        return
    if student is not None and student.config is not None and student.quantization is None:
        message = "a student made from a config has random weights, which an adapter cannot make up for; remove it"
        problems.add_check((*path, "lora"), message)
    for key in ("r", "lora_alpha"):
        if getattr(lora, key) <= 0:
            problems.add_check((*path, "lora", key), f"{getattr(lora, key)} must be greater than 0")
    if not 0 <= lora.lora_dropout < 1:
        problems.add_check((*path, "lora", "lora_dropout"), f"{lora.lora_dropout} must be at least 0 and below 1")


def _check_trainer(stage: StageSpec, path: Path, problems: Problems) -> None:
    options = {key: value for key, value in stage.trainer.items() if value is not None}
    for key in _POSITIVE:
        if options.get(key, 1) <= 0:
            problems.add_check((*path, key), f"{options[key]} must be greater than 0")
    for key in _NOT_NEGATIVE:
        if options.get(key, 0) < 0:
            problems.add_check((*path, key), f"{options[key]} must not be negative")
    if options.get("max_steps") == 0:
        problems.add_check((*path, "max_steps"), "0 would train num_train_epochs instead; leave the stage out to train nothing")
    if options.get("packing") and stage.trainer.get("max_length", 1) is None:
        problems.add_check((*path, "packing"), "fills blocks of max_length tokens, which is null; give a number")
    if options.get("load_best_model_at_end") and options.get("eval_strategy", "no") == "no":
        problems.add_check((*path, "load_best_model_at_end"), "needs evaluations to choose by; set eval_strategy")
