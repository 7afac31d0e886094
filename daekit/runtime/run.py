"""Runs a recipe: its stages in order, each once, each resumed where it was stopped, then the report."""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.data.mixture import Mixture
from daekit.errors import UserError
from daekit.evaluation.suites import run_suite
from daekit.files import write_json, write_whole
from daekit.models.loading import load_model
from daekit.models.sharded import shape_of
from daekit.recipe import sharing_notes, stage_key, student_key, to_yaml
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluatedModel, ModelSpec, Recipe
from daekit.recipe.suite import SubjectSpec
from daekit.report import format_table, write_report
from daekit.report.provenance import commit, versions
from daekit.runtime import (
    DataBuilder,
    ModelBuilder,
    RunFolder,
    StageFolder,
    build_report,
    build_student,
    build_trainer,
    cache_stage,
    read_file,
)
from daekit.trainers import KDTrainer
from daekit.trainers.checkpoint import checkpoints, is_committed
from daekit.trainers.distributed import refuse_launch


def run_recipe(recipe: Recipe) -> None:
    """Run all stages of a recipe that are not complete yet, then write the report.

    Started again with the same recipe it keeps what is complete and resumes what was stopped. Under ``accelerate launch``
    every rank calls it.

    Raises:
        UserError: the output directory holds another run; anything that is wrong with data, models or settings.
    """
    refuse_launch()
    state = _ranks()
    _quieten()
    folder = RunFolder(Path(recipe.output_dir))
    if state.is_main_process:
        _claim(recipe, folder)
    state.wait_for_everyone()
    data = DataBuilder(recipe)
    with state.main_process_first():
        tokenizer = data.tokenizer(folder)
    models = ModelBuilder(folder, tokenizer)
    for name in recipe.stages:
        if folder.stage(name).done.is_file():
            _say(state, f"[{name}] complete, kept")
        else:
            _run_stage(recipe, name, folder, data, models)
            _free_memory()
        state.wait_for_everyone()
    # the other ranks are done: a barrier would time out while the main process generates answers
    if recipe.evaluation is not None and state.is_main_process:
        if recipe.evaluation.sources:
            _report(recipe, folder, data, models, state)
        _suites(recipe, folder)


def init_students(recipe: Recipe) -> None:
    """Make the students that are made from their teachers, and train nothing; in one process.

    A student whose teacher is a stage of the recipe that is not complete yet is left to ``run_recipe``.
    """
    state = _ranks()
    _quieten()
    folder = RunFolder(Path(recipe.output_dir))
    made = [name for name, stage in recipe.stages.items() if stage.student is not None and stage.student.init is not None]
    if not made:
        raise UserError(f"{recipe.name}: no stage makes its student from a teacher (`student: {{from: TEACHER, ...}}`)")
    _claim(recipe, folder)
    data = DataBuilder(recipe)
    models = ModelBuilder(folder, data.tokenizer(folder))
    for name in made:
        missing = [used for used in student_key(recipe, name)["stages"] if not folder.stage(used).done.is_file()]
        if missing:
            print(
                f"[{name}] its teacher comes from the stage {missing[0]!r}, which is not complete: run the recipe", flush=True
            )
            continue
        home = build_student(recipe, name, folder, data, models, state.device)
        print(f"[{name}] {home.model}", flush=True)
        _free_memory()


def cache_teachers(recipe: Recipe) -> None:
    """Make what is missing of the caches of a recipe's teachers, and train nothing. Under a launcher every rank calls it.

    A stage whose models come from a stage of the recipe that is not complete yet is left to ``run_recipe``.
    """
    refuse_launch()
    state = _ranks()
    _quieten()
    folder = RunFolder(Path(recipe.output_dir))
    cached = [name for name, stage in recipe.stages.items() if any(each.cache for each in stage.teachers_by_key().values())]
    if not cached:
        raise UserError(f"{recipe.name}: no teacher has a cache (`teacher: {{path: ..., cache: hidden}}`)")
    if state.is_main_process:
        _claim(recipe, folder)
    state.wait_for_everyone()
    data = DataBuilder(recipe)
    with state.main_process_first():
        models = ModelBuilder(folder, data.tokenizer(folder))
    for name in cached:
        missing = [used for used in stage_key(recipe, name)["stages"] if not folder.stage(used).done.is_file()]
        if missing:
            _say(state, f"[{name}] needs the stage {missing[0]!r}, which is not complete: run the recipe")
        else:
            cache_stage(recipe, name, folder.stage(name), data, models)


def calibration() -> str:
    """One line that says how fast this machine is right now: a matrix product of 1024^3 in float32, best of 5."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    best, worst = min(seconds[1:]), max(seconds[1:])
    return (
        f"calibration: 1024^3 float32 matrix product {best * 1e3:.1f} ms ({2 * 1024**3 / best / 1e9:.0f} GFLOP/s; "
        f"worst {worst * 1e3:.1f} ms), {torch.get_num_threads()} threads"
    )


def _ranks() -> PartialState:
    """The processes of this run; on a CPU they are one run only if it is told so (the trainers' configs do the same)."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _claim(recipe: Recipe, folder: RunFolder) -> None:
    """Make sure that what lies in the output directory is of this recipe, and write the recipe there."""
    if folder.recipe.is_file():
        theirs = read_file(folder.recipe, delete=folder.recipe).get("name")
        if theirs != recipe.name:
            raise UserError(
                f"output_dir={recipe.output_dir}: holds a run of the recipe {theirs!r}, not of {recipe.name!r}. "
                "Choose another output_dir, or delete this one."
            )
    for name in recipe.stages:
        key_file = folder.stage(name).key
        if key_file.is_file():
            now = json.loads(json.dumps(stage_key(recipe, name)))
            changed = _first_difference(read_file(key_file, delete=folder.stage(name).root), now)
            if changed:
                raise UserError(
                    f"output_dir={recipe.output_dir}: its stage {name!r} was begun with another recipe ({changed}). "
                    f"Choose another output_dir, or delete {folder.stage(name).root} and the stages that use it."
                )
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={recipe.output_dir}: cannot be made ({error.strerror}); choose another") from error
    write_whole(folder.recipe, to_yaml(recipe))


def _run_stage(recipe: Recipe, name: str, folder: RunFolder, data: DataBuilder, models: ModelBuilder) -> None:
    state, stage = _ranks(), folder.stage(name)
    if state.is_main_process:
        stage.root.mkdir(parents=True, exist_ok=True)
        write_json(stage.key, stage_key(recipe, name))
    state.wait_for_everyone()
    start = time.perf_counter()
    _make_student(recipe, name, folder, data, models)
    trainer, mixture = build_trainer(recipe, name, stage, data, models)
    _say(state, _stage_heading(name, recipe, trainer, mixture))
    resume = any(is_committed(each) for each in checkpoints(stage.root))
    trainer.train(resume_from_checkpoint=resume)
    _save_result(recipe, name, stage, trainer)
    provenance = _provenance(trainer, mixture)  # all ranks: sharded weights are gathered to be hashed
    if state.is_main_process:
        facts = {
            "stage": name,
            "seconds": round(time.perf_counter() - start, 1),
            "resumed": resume,
            "log_history": trainer.state.log_history,
        }
        (stage.model / "recipe.yaml").write_text(to_yaml(recipe))
        write_json(stage.model / "provenance.json", provenance)
        write_json(stage.done, facts | provenance)
        print(f"[{name}] complete in {facts['seconds']:.0f} s -> {stage.model}", flush=True)


def _make_student(recipe: Recipe, name: str, folder: RunFolder, data: DataBuilder, models: ModelBuilder) -> None:
    """Make the student of a stage if it is made from a teacher; of several ranks none could wait for a search of hours."""
    spec, state = recipe.stages[name].student, _ranks()
    if spec is None or spec.init is None:
        return
    if state.num_processes > 1 and not folder.student(student_key(recipe, name)).model.is_dir():
        raise UserError(
            f"stages.{name}.student: is made from its teacher in one process; run `daekit init RECIPE` first (if the "
            "teacher is a stage of this recipe: `daekit train RECIPE` without accelerate launch up to there)"
        )
    build_student(recipe, name, folder, data, models, state.device)
    _free_memory()


def _save_result(recipe: Recipe, name: str, stage: StageFolder, trainer: KDTrainer) -> None:
    lora = recipe.stages[name].lora
    merge = lora is not None and lora.merge
    trainer.save_model(str(stage.adapter if merge else stage.model))
    unset_hf_deepspeed_config()  # what is loaded from here on belongs to one rank; ZeRO-3 would split it over all
    if merge and trainer.args.should_save:
        load_model(ModelSpec(path=str(stage.adapter))).save_pretrained(stage.model)
        trainer.processing_class.save_pretrained(stage.model)


def _stage_heading(name: str, recipe: Recipe, trainer: KDTrainer, mixture: Mixture) -> str:
    trained = sum(shape_of(p).numel() for p in trainer.model.parameters() if p.requires_grad)
    lines = [f"[{name}] {recipe.stages[name].type}: {trained:,} trained parameters, {len(mixture.dataset):,} rows"]
    for use in mixture.table:
        lines.append(
            f"    {use.source} ({use.domain}): {use.used:,} of {use.available:,} rows, "
            f"{use.share:.0%} of the mixture, each {use.repeats:.3g} times"
        )
    for domain, count in trainer.data_counts["train"].items():
        lost = {what: n for what, n in asdict(count).items() if what not in ("rows", "kept_tokens") and n}
        lines.append(f"    {domain}: {count.rows:,} rows, {count.kept_tokens:,} kept tokens" + (f", {lost}" if lost else ""))
    notes = [note for note in sharing_notes(recipe) if note.startswith(f"stages.{name}.")]
    return "\n".join([*lines, *(f"    note: {note}" for note in notes)])


def _provenance(trainer: KDTrainer, mixture: Mixture) -> dict[str, Any]:
    return {
        "versions": versions(),
        "commit": commit(),
        "run": trainer.run_facts(),
        "mixture": [asdict(use) for use in mixture.table],
        "rows": {name: {d: asdict(c) for d, c in counts.items()} for name, counts in trainer.data_counts.items()},
    }


def _report(recipe: Recipe, folder: RunFolder, data: DataBuilder, models: ModelBuilder, state: PartialState) -> None:
    """Evaluate and write; kept if neither the stages nor the evaluation have changed since."""
    assert recipe.evaluation is not None
    sources = {name: recipe.sources[name].model_dump(mode="json") for name in recipe.evaluation.sources}
    stages = {name: folder.stage(name).done.read_text() for name in recipe.stages}
    key = {"evaluation": recipe.evaluation.model_dump(mode="json"), "sources": sources, "stages": stages}
    key_file = folder.report / "report_key.json"
    if key_file.is_file() and json.loads(key_file.read_text()) == key:
        print(f"[report] complete, kept: {folder.report / 'report.html'}", flush=True)
        return
    provenance = {"versions": versions(), "commit": commit(), "machine": calibration()}
    report = build_report(recipe, folder, data, models, state.device, provenance)
    write_report(folder.report, report)
    write_json(key_file, key)
    print(f"\n{format_table(report.rows)}\n\nReport: {folder.report / 'report.html'}", flush=True)


def _suites(recipe: Recipe, folder: RunFolder) -> None:
    """The suites of the recipe, each on the results of its stages and whatever models it names itself."""
    assert recipe.evaluation is not None
    evaluated = {each.name: _subject(recipe, each, folder) for each in recipe.evaluation.models}
    for suite in recipe.evaluation.suites:
        update = {
            "models": evaluated | suite.models,
            "output_dir": str(folder.suite(suite.name)),
            "baseline": suite.baseline or recipe.evaluation.baseline,
        }
        report = run_suite(suite.model_copy(update=update))
        assert report is not None  # no dry run
        print(f"\n{format_table(report.rows)}\n\nSuite: {folder.suite(suite.name) / 'report.html'}", flush=True)


def _subject(recipe: Recipe, model: EvaluatedModel, folder: RunFolder) -> SubjectSpec:
    """A model of the report as suites name it; that it has a directory is checked when the recipe is loaded."""
    spec: ModelSpec = model
    if model.name == STUDENT_AS_IT_WAS:
        first, stage = next(iter(recipe.stages.items()))
        assert stage.student is not None, "a resolved recipe names every student"
        made = stage.student.init is not None
        spec = ModelSpec(path=str(folder.student(student_key(recipe, first)).model.resolve())) if made else stage.student
    elif model.stage is not None:
        part = "model" if model.checkpoint is None else f"checkpoint-{model.checkpoint}"
        spec = ModelSpec(path=str((folder.stage(model.stage).root / part).resolve()))
    shared = SubjectSpec.model_fields.keys() & ModelSpec.model_fields.keys()
    return SubjectSpec(**{key: getattr(spec, key) for key in shared})


def _free_memory() -> None:
    """A trainer and its model refer to each other in circles: without this a teacher would stay on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_difference(then: Any, now: Any, path: str = "") -> str:
    """Where two JSON values differ first, in words; empty if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            found = _first_difference(then.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if then == now else f"{path}: {json.dumps(then)} then, {json.dumps(now)} now"


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        print(text, flush=True)


def _quieten() -> None:
    """Leave the terminal to one line per log: progress bars of a second each and warnings about TRL's own defaults go."""
    logging.getLogger("daekit").setLevel(logging.ERROR)  # the heading of a stage says what became of its rows
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
