"""Runs a recipe: its stages in order, each once, each resumed where it was stopped, then the report."""

from __future__ import annotations

import json
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from daekit.errors import UserError, listed, nearest, says_read_only
from daekit.evaluation.suites import run_prepared
from daekit.files import write_json
from daekit.generation import Permissions
from daekit.models.placement import free_memory
from daekit.recipe import stage_key, student_key
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluatedModel, EvaluationSpec, ModelSpec, Recipe
from daekit.recipe.suite import SuiteModelSpec
from daekit.report import format_report, format_table, write_report
from daekit.runtime.data import DataBuilder
from daekit.runtime.found import Found
from daekit.runtime.generated import find_sources, generated_sources
from daekit.runtime.kept import claim
from daekit.runtime.lock import RunLock
from daekit.runtime.models import ModelBuilder
from daekit.runtime.prepare import Prepared, complete_rows, prepare
from daekit.runtime.quiet import quieten, say
from daekit.runtime.report import build_report
from daekit.runtime.signals import GRACE, StopRequest
from daekit.runtime.stage import run_stage
from daekit.runtime.student import build_student
from daekit.runtime.trainer import cache_stage
from daekit.trainers.distributed import refuse_launch
from daekit.trainers.machines import by_main, connected, require_shared

_LATER = "which is not complete: run the recipe"


def run_recipe(recipe: Recipe, grace: float = GRACE, allowed: Permissions = Permissions()) -> None:
    """Run all stages of a recipe that are not complete yet, then write the report.

    Started again with the same recipe it keeps what is complete and resumes what was stopped. Under ``accelerate launch``
    every rank calls it. SIGTERM, SIGHUP, SIGUSR1 and SIGINT end it, a training after its next step with a checkpoint.

    Args:
        recipe: what to run.
        grace: seconds that a signal leaves it before the process ends.
        allowed: which keys its suites may send where.

    Raises:
        UserError: the output directory holds another run, or is being written to by one; anything that is wrong with data,
            models or settings.
        Stopped: a signal came.
    """
    with _held(recipe, grace) as stop:
        prepared = prepare(recipe, allowed)
        _claim(prepared.models.data, [f"note: {note}" for note in prepared.notes])
        for name in recipe.stages:
            if by_main(prepared.models.folder.stage(name).done.is_file):
                say(f"[{name}] complete, kept")
            else:
                complete_rows(prepared, name)
                run_stage(prepared, name, stop)
                free_memory()
            PartialState().wait_for_everyone()
        # the other ranks are done: a barrier would time out while the main process generates answers
        if recipe.evaluation is not None and PartialState().is_main_process:
            if recipe.evaluation.sources:
                for name in recipe.evaluation.sources:
                    if name in prepared.generated:
                        prepared.generated[name].write()
                _report(prepared.models, recipe.evaluation)
            _suites(prepared, recipe.evaluation)


def init_students(recipe: Recipe, grace: float = GRACE) -> None:
    """Make the students that are made from their teachers, and train nothing; in one process.

    A student whose teacher is a stage of the recipe that is not complete yet is left to ``run_recipe``.
    """
    made = [name for name, stage in recipe.stages.items() if stage.student is not None and stage.student.init is not None]
    if not made:
        raise UserError(f"{recipe.name}: no stage makes its student from a teacher (`student: {{from: TEACHER, ...}}`)")
    with _held(recipe, grace):
        if (ranks := PartialState().num_processes) > 1:
            raise UserError(f"daekit init: makes students in one process, and {ranks} were launched; run it without a launcher")
        models = ModelBuilder(DataBuilder(recipe))
        _claim(models.data)
        find_sources(models)
        for name in made:
            if missing := models.folder.first_missing(student_key(recipe, name)["stages"]):
                say(f"[{name}] its teacher comes from the stage {missing!r}, {_LATER}")
            else:
                say(f"[{name}] {build_student(models, name).model}")
                free_memory()


def cache_teachers(recipe: Recipe, grace: float = GRACE, allowed: Permissions = Permissions(), check: bool = False) -> None:
    """Make what is missing of the caches of a recipe's teachers, and train nothing. Under a launcher every rank calls it.

    With ``check`` some rows of each are compared with its teacher, and the differences printed.

    A stage whose models come from a stage of the recipe that is not complete yet is left to ``run_recipe``.
    """
    cached = [name for name, stage in recipe.stages.items() if any(each.cache for each in stage.teachers_by_key().values())]
    if not cached:
        raise UserError(f"{recipe.name}: no teacher has a cache (`teacher: {{path: ..., cache: hidden}}`)")
    with _held(recipe, grace):
        models = ModelBuilder(DataBuilder(recipe), allowed)
        _claim(models.data)
        find_sources(models)
        for name in cached:
            if missing := models.folder.first_missing(stage_key(recipe, name)["stages"]):
                say(f"[{name}] needs the stage {missing!r}, {_LATER}")
            else:
                cache_stage(models, name, check)


def generate_sources(recipe: Recipe, names: Sequence[str], grace: float = GRACE, allowed: Permissions = Permissions()) -> None:
    """Write the rows of generated sources (``names``; default: all), and train nothing.

    A source whose model comes from a stage of the recipe that is not complete yet is left to ``run_recipe``.

    Raises:
        UserError: there is no such source; everything that ``GeneratedSource`` raises.
    """
    known = [name for name, source in recipe.sources.items() if source.generated is not None]
    for name in names:
        if name not in known:
            raise UserError(f"daekit generate: no generated source {name!r} (there are: {listed(known)}){nearest(name, known)}")
    if not known:
        raise UserError(f"{recipe.name}: no source is written by a model (`generated: {{model: ..., prompts: self, rows: N}}`)")
    with _held(recipe, grace):
        models, found = ModelBuilder(DataBuilder(recipe), allowed), Found(recipe.name)
        sources = generated_sources(models)
        waits = {name: sources[name].waits_for for name in names or known}
        possible = [sources[name] for name, stage in waits.items() if stage is None]
        for source in possible:
            with found.at(f"sources.{source.name}"):
                source.check()
        found.raise_if_any()
        _claim(models.data, [f"[{name}] needs the stage {stage!r}, {_LATER}" for name, stage in waits.items() if stage])
        for source in possible:
            kept, path = source.find(), source.write()
            if kept:
                say(f"[{source.where}] complete, kept: {path}")


@contextmanager
def _held(recipe: Recipe, grace: float) -> Iterator[StopRequest]:
    """The output directory is this run's alone, signals are handled, and a directory that turns read-only is told as such."""
    state, folder = processes_of(recipe), Path(recipe.output_dir)
    lock = RunLock(folder)
    if state.is_main_process:
        lock.acquire()
    state.wait_for_everyone()
    require_shared(folder)
    try:
        with StopRequest(grace, before_end=lock.release) as stop:
            yield stop
    except Exception as error:  # the libraries that write have no class in common for it
        place = Path(getattr(error, "filename", None) or folder).absolute()
        if not says_read_only(error) or folder.absolute() not in (place, *place.parents):
            raise
        raise UserError(
            f"output_dir={folder}: {place} cannot be written ({getattr(error, 'strerror', None) or error}). What was "
            "saved before is whole; make the directory writable and run again: it goes on from there."
        ) from error
    finally:
        lock.release()


def calibration() -> str:
    """One line that says how fast this machine is right now: a matrix product of 1024^3 in float32, best of 5."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = timeit.repeat(lambda: a @ b, number=1, repeat=6)[1:]
    best, worst = min(seconds), max(seconds)
    return (
        f"calibration: 1024^3 float32 matrix product {best * 1e3:.1f} ms ({2 * 1024**3 / best / 1e9:.0f} GFLOP/s; "
        f"worst {worst * 1e3:.1f} ms), {torch.get_num_threads()} threads"
    )


def processes_of(recipe: Recipe) -> PartialState:
    """The processes of this run, which wait for each other as long as the most patient of its stages says."""
    refuse_launch()
    quieten()
    patience = [stage.trainer["ddp_timeout"] for stage in recipe.stages.values() if "ddp_timeout" in stage.trainer]
    return connected(max(patience, default=None))


def _claim(data: DataBuilder, notes: Sequence[str] = ()) -> None:
    """Once every rank has checked what it needs: the output directory is the recipe's, and holds its tokenizer."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        claim(data.recipe)
        data.save_tokenizer()
        say(*notes)
    state.wait_for_everyone()


def _report(models: ModelBuilder, evaluation: EvaluationSpec) -> None:
    """Evaluate and write; kept if neither the stages nor the evaluation have changed since."""
    recipe, folder = models.recipe, models.folder
    key = {
        "evaluation": evaluation.model_dump(mode="json"),
        "sources": {name: recipe.sources[name].model_dump(mode="json") for name in evaluation.sources},
        "stages": {name: folder.stage(name).done.read_text() for name in recipe.stages},
        "rows": {name: each.fingerprint() for name, each in models.data.evaluation_sets.items()},
        "files": {each.name: _files_of(each) for each in evaluation.models},
    }
    key_file, page = folder.report / "report_key.json", folder.report / "report.html"
    if key_file.is_file() and json.loads(key_file.read_text()) == key:
        print(f"[report] complete, kept: {page}", flush=True)
        return
    report = build_report(models, calibration())
    write_report(folder.report, report)
    write_json(key_file, key)
    print(f"\n{format_table(report.rows)}\n\nReport: {page}", flush=True)


def _files_of(model: EvaluatedModel) -> list[list[str | int]]:
    """Names, sizes in bytes and times of a local model's files: they tell whether others lie there now, without being read."""
    folders = [Path(each).expanduser() for each in (model.path, model.adapter) if each is not None]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()) if file.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _suites(prepared: Prepared, evaluation: EvaluationSpec) -> None:
    """The suites of the recipe, each on the results of its stages and whatever models it names itself."""
    evaluated = {each.name: _suite_model(prepared.models, each) for each in evaluation.models}
    for suite in prepared.suites:
        report = run_prepared(suite.with_models(evaluated))
        print(f"\n{format_report(report)}\n\nSuite: {suite.folder / 'report.html'}", flush=True)


def _suite_model(models: ModelBuilder, model: EvaluatedModel) -> SuiteModelSpec:
    """A model of the report as suites name it; that it has a directory is checked when the recipe is loaded."""
    as_it_was = model.name == STUDENT_AS_IT_WAS
    spec = models.start_of(next(iter(models.recipe.stages))) if as_it_was else models.placed(model)
    shared = SuiteModelSpec.model_fields.keys() & ModelSpec.model_fields.keys()
    return SuiteModelSpec(**{key: getattr(spec, key) for key in shared})
