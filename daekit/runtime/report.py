"""The report that ends a run: every model of the recipe on every set of validation rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from daekit.evaluation import ModelEvaluation, compare, evaluate_model, select_samples
from daekit.protocol import Teacher
from daekit.recipe import is_lora
from daekit.recipe.adapter_config import BARE_BASE
from daekit.recipe.schema import ModelSpec, Recipe, TeacherSpec
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
    sets = data.evaluation_sets
    evaluations: list[ModelEvaluation] = []
    for name in spec.models:
        print(f"[report] evaluating {name}", flush=True)
        model = models.model(ModelSpec(stage=name)).to(device)
        teachers = _teachers(recipe, name, models, {each.domain for each in sets.values()}, device)
        evaluations.append(evaluate_model(name, model, models.tokenizer, sets, spec=spec, teachers=teachers))
        del model, teachers  # before the next ones are loaded
    rows = [row for evaluation in evaluations for row in evaluation.rows(spec.bootstrap)]
    if spec.baseline is not None:
        domains = _reference_domains(recipe)
        rows += compare(evaluations, spec.baseline, reference_domains=domains, rounds=spec.bootstrap)
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


def _teachers(recipe: Recipe, name: str, models: ModelBuilder, domains: Iterable[str], device: Any) -> dict[str, Teacher]:
    """Domain -> what the stage's student was told to follow there; nothing for a stage without teachers."""
    stage = recipe.stages[name]
    if stage.type == "sft":
        return {}
    assert stage.student is not None, "a resolved recipe names every student"
    if stage.teacher is not None:
        specs = dict.fromkeys(domains, stage.teacher)
    else:
        start = ModelSpec(adapter=stage.student.adapter or BARE_BASE) if is_lora(stage) else models.start_of(recipe, name)
        reference = stage.reference or TeacherSpec(model=start)
        specs = stage.teachers | dict.fromkeys(stage.reference_domains, reference)
    teachers = models.teachers({domain: specs[domain] for domain in domains if domain in specs})
    return {domain: teacher.to(device) for domain, teacher in models.on_base(teachers, stage.student, device).items()}


def _reference_domains(recipe: Recipe) -> list[str]:
    """Where a change is forgetting: the reference domains of the recipe's dae stages, by default ``general``."""
    domains = [domain for stage in recipe.stages.values() if stage.type == "dae" for domain in stage.reference_domains]
    return domains or ["general"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
