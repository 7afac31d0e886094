"""The report that ends a run: every model of the recipe on every set of validation rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from daekit.evaluation import ModelEvaluation, compare, evaluate_model, select_samples
from daekit.protocol import Teacher
from daekit.recipe import is_lora
from daekit.recipe.adapter_config import BARE_BASE
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluatedModel, ModelSpec, Recipe, StageSpec, TeacherSpec
from daekit.report import Report
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import RunFolder
from daekit.runtime.models import ModelBuilder


def build_report(
    recipe: Recipe, folder: RunFolder, data: DataBuilder, models: ModelBuilder, device: Any, provenance: dict[str, Any]
) -> Report:
    """Evaluate the recipe's models and put everything that a reader wants together.

    Args:
        device: where the models run.
        provenance: versions of packages (``versions``) and further facts of the run.
    """
    spec = recipe.evaluation
    assert spec is not None
    sets = data.evaluation_sets(models.tokenizer)
    evaluations: list[ModelEvaluation] = []
    for each in spec.models:
        print(f"[report] evaluating {each.name}", flush=True)
        model = _model(recipe, each, models).to(device)
        domains = {rows.domain for rows in sets.values()}
        teachers = _teachers(recipe.stages[each.name], models, domains, device) if each.is_stage else {}
        evaluations.append(evaluate_model(each.name, model, models.tokenizer, sets, spec=spec, teachers=teachers))
        del model, teachers  # before the next ones are loaded
    rows = [row for evaluation in evaluations for row in evaluation.rows(spec.bootstrap)]
    if spec.baseline is not None:
        rows += compare(evaluations, spec.baseline, reference_domains=_reference_domains(recipe), rounds=spec.bootstrap)
    done = {name: folder.stage(name).read_done() or {} for name in recipe.stages}
    return Report(
        title=recipe.name,
        rows=tuple(rows),
        baseline=spec.baseline,
        samples=tuple(select_samples(evaluations, sets)),
        curves={name: facts["log_history"] for name, facts in done.items()},
        notes=tuple(note for source, each in sets.items() for note in each.notes(source)),
        versions=provenance["versions"],
        seconds={name: facts["seconds"] for name, facts in done.items()},
        provenance={key: _text(value) for key, value in provenance.items() if key != "versions"},
        recipe=folder.recipe.read_text(),
    )


def _model(recipe: Recipe, spec: EvaluatedModel, models: ModelBuilder) -> PreTrainedModel:
    if spec.name != STUDENT_AS_IT_WAS:
        return models.model(spec)
    first, stage = next(iter(recipe.stages.items()))
    return models.student(recipe, first, recipe.seed if stage.seed is None else stage.seed)


def _teachers(stage: StageSpec, models: ModelBuilder, domains: Iterable[str], device: Any) -> dict[str, Teacher]:
    """Domain -> what the stage's student was told to follow there; nothing for a stage without teachers."""
    if stage.type == "sft":
        return {}
    assert stage.student is not None, "a resolved recipe names every student"
    if stage.type == "kd":
        specs = dict.fromkeys(domains, stage.teacher)
    else:
        start = ModelSpec(adapter=stage.student.adapter or BARE_BASE) if is_lora(stage) else stage.student
        given = stage.reference
        reference = TeacherSpec(model=start) if given is None or given.is_student else given
        specs = stage.teachers | dict.fromkeys(stage.reference_domains, reference)
    teachers = models.teachers({domain: specs[domain] for domain in domains if domain in specs and not specs[domain].labels})
    return {domain: teacher.to(device) for domain, teacher in models.on_base(teachers, stage.student, device).items()}


def _reference_domains(recipe: Recipe) -> list[str]:
    """Where a change is forgetting: the reference domains of the recipe's dae stages, by default ``general``."""
    domains = [domain for stage in recipe.stages.values() if stage.type == "dae" for domain in stage.reference_domains]
    return domains or ["general"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
