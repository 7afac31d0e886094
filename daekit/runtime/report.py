"""The report that ends a run: every model of the recipe on every set of validation rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from daekit.evaluation import ModelEvaluation, compare, evaluate_model, select_samples
from daekit.evaluation.likelihood import Measured
from daekit.models.backbone import base_of
from daekit.models.identity import fingerprint
from daekit.progress import Progress
from daekit.protocol import Teacher
from daekit.recipe.adapter_config import BARE_BASE
from daekit.recipe.schema import STUDENT_AS_IT_WAS, DAEStage, EvaluatedModel, EvaluationSpec, KDStage, ModelSpec, TeacherSpec
from daekit.recipe.validation import dotted
from daekit.report import Report
from daekit.report.provenance import commit, versions
from daekit.runtime.data import DataBuilder, LossRule
from daekit.runtime.folders import read_file
from daekit.runtime.models import ModelBuilder
from daekit.runtime.preflight import warnings
from daekit.teachers.parts import frozen_models

_REFERENCE = "//reference"  # beside the domains, whose names hold no slash


def build_report(models: ModelBuilder, machine: str) -> Report:
    """Evaluate the recipe's models and put everything that a reader wants together; ``machine``: what to say of its speed."""
    recipe, folder, sets = models.recipe, models.folder, models.data.evaluation_sets
    spec = recipe.evaluation
    assert spec is not None
    for name in recipe.stages:
        for key in (key for key, teacher in recipe.measured_teachers(name).items() if teacher.cache is not None):
            why = "loaded to measure KL to it on validation rows, for its cache holds rows of the training"
            print(f"[report] stages.{name}.{dotted(key)}: {why}", flush=True)
    evaluations = [_evaluation(models, spec, each) for each in spec.models]
    rows = [row for evaluation in evaluations for row in evaluation.rows(spec.bootstrap)]
    if spec.baseline is not None:
        # where a change is forgetting
        kept = [domain for stage in recipe.stages.values() if stage.type == "dae" for domain in stage.reference_domains]
        rows += compare(evaluations, spec.baseline, reference_domains=kept or ["general"], rounds=spec.bootstrap)
    done = {name: read_file(folder.stage(name).done) for name in recipe.stages}
    return Report(
        title=recipe.name,
        rows=tuple(rows),
        baseline=spec.baseline,
        samples=tuple(select_samples(evaluations, sets)),
        curves={name: facts["log_history"] for name, facts in done.items()},
        notes=(*_expert_notes(done), *_notes(models.data)),
        versions=versions(),
        seconds={name: facts["seconds"] for name, facts in done.items()},
        provenance={"commit": commit(), "machine": machine},
        recipe=folder.recipe.read_text(),
    )


def _evaluation(models: ModelBuilder, spec: EvaluationSpec, each: EvaluatedModel) -> ModelEvaluation:
    """What is measured of one model; kept, so that a report that was stopped goes on, and more models alone are asked."""
    print(f"[report] evaluating {each.name}", flush=True)
    as_it_was, sets = each.name == STUDENT_AS_IT_WAS, models.data.evaluation_sets
    model = (models.student(next(iter(models.recipe.stages))) if as_it_was else models.model(each)).to(models.device)
    teachers = _teachers(models, each, {rows.domain for rows in sets.values()})
    reference = teachers.pop(_REFERENCE, None)
    key = {
        "model": _facts(model) | {"ends": str(model.generation_config.eos_token_id)},
        "teachers": {domain: _facts_of_teacher(teacher) for domain, teacher in teachers.items()},
        "reference": None if reference is None else _facts_of_teacher(reference),
        "rows": [[source, rows.domain, rows.fingerprint()] for source, rows in sets.items()],  # their order pairs models
        "settings": spec.model_dump(mode="json", include={"generate", "max_new_tokens", "batch_size"}),
        "versions": versions(("daekit", "torch", "transformers")),
    }

    def measure(progress: Progress) -> Measured:
        asked: dict[str, Any] = {"spec": spec, "teachers": teachers, "reference": reference, "progress": progress.part}
        found = evaluate_model(each.name, model, models.tokenizer, sets, **asked)
        return Measured(found.values, generated=found.generated)

    measured = Measured.once(models.folder.measured(key), key, f"[report] {each.name}", measure)
    return ModelEvaluation(each.name, measured.values, measured.generated)


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a model computes depends on: its weights, config, attention, and the scale of its adapters."""
    base = base_of(model)
    config = {key: value for key, value in base.config.to_diff_dict().items() if not key.startswith("_")}
    scales = ("r", "lora_alpha", "use_rslora", "use_dora")
    adapters = {name: [getattr(each, key, None) for key in scales] for name, each in getattr(model, "peft_config", {}).items()}
    return {
        "weights": fingerprint(model),
        "config": config,
        "attention": base.config._attn_implementation,
        "adapters": adapters,
    }


def _facts_of_teacher(teacher: Teacher) -> dict[str, Any]:
    return {"identity": teacher.identity(), "models": [_facts(model) for _, model in frozen_models(teacher)]}


def _teachers(models: ModelBuilder, each: EvaluatedModel, domains: Collection[str]) -> dict[str, Teacher]:
    """Domain -> what a student was told to follow there; ``_REFERENCE`` -> what it was not to go away from.

    The reference is that of a dae stage. Other models are measured against it, too, if all dae stages have the same.
    """
    specs: dict[str, TeacherSpec] = {}
    stage = models.recipe.stages[each.name] if each.is_stage else None
    if isinstance(stage, KDStage):
        specs = dict.fromkeys(domains, stage.teacher)
    elif isinstance(stage, DAEStage):
        specs = stage.teachers | dict.fromkeys((*stage.reference_domains, _REFERENCE), _reference_of(models, each.name))
    # KL to labels is their NLL; a server says too little
    specs = {domain: specs[domain] for domain in (*domains, _REFERENCE) if domain in specs and specs[domain].has_models}
    found = models.on_base(models.teachers(specs), models.student_spec(each.name)) if specs else {}
    if _REFERENCE not in found and (shared := _shared_reference(models)) is not None:
        spec, student = shared
        found |= models.on_base({_REFERENCE: models.teacher(spec)}, student)
    return {domain: teacher.to(models.device) for domain, teacher in found.items()}


def _reference_of(models: ModelBuilder, name: str) -> TeacherSpec:
    """The reference of a dae stage: the one that it names, or its student before the stage."""
    stage = models.recipe.stages[name]
    if isinstance(stage, DAEStage) and stage.reference is not None and stage.reference.kind != "student":
        return stage.reference
    on_base = ModelSpec(adapter=models.student_spec(name).adapter or BARE_BASE)
    return TeacherSpec(model=on_base if stage.is_lora else models.start_of(name))


def _shared_reference(models: ModelBuilder) -> tuple[TeacherSpec, ModelSpec] | None:
    """(reference, the student whose base it may be an adapter of) of all dae stages; None if there is none, or several."""
    names = [name for name, stage in models.recipe.stages.items() if isinstance(stage, DAEStage)]
    found = [(_reference_of(models, name), models.start_of(name)) for name in names]
    return found[0] if found and all(each == found[0] for each in found) and found[0][0].has_models else None


def _expert_notes(done: Mapping[str, Any]) -> Iterator[str]:
    for name, facts in done.items():
        preflight = facts.get("preflight", {})
        yield from (f"Stage {name}: {warning}" for warning in warnings(preflight))
        unscored = {domain: each["not_scored"] for domain, each in preflight.items() if "not_scored" in each}
        yield from (f"Stage {name}: the expert of {domain} was not scored: {why}" for domain, why in unscored.items())


def _notes(data: DataBuilder) -> Iterator[str]:
    for source, each in data.evaluation_sets.items():
        yield from each.notes(source)
    stages = data.recipe.stages
    if any(isinstance(stage, DAEStage) for stage in stages.values()):
        yield (
            "KL to reference: how far a model went from the reference of the dae stage, in nats per token. NLL of "
            "answers that another model has written cannot show forgetting: it falls when a model takes on their style."
        )
    for name in [name for name, stage in stages.items() if LossRule.of(stage) != data.report_rule]:
        yield f"Stage {name} was trained on other tokens than are scored here (assistant_only_loss, completion_only_loss)."
