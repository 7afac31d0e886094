"""Everything that a run will need, opened before its first step: a run that begins is not ended later by what was wrong before.

``daekit check --deep`` is this function alone; ``daekit preview`` shows what it has prepared; a run goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.errors import UserError, listed
from daekit.evaluation import suites
from daekit.generation import Permissions
from daekit.models.adapters import lora_config
from daekit.models.placement import require_devices
from daekit.recipe.model import ModelSpec
from daekit.recipe.schema import STUDENT_AS_IT_WAS, Recipe, StageSpec
from daekit.recipe.suite import SuiteSpec
from daekit.recipe.validation import dotted
from daekit.runtime import stage_rows
from daekit.runtime.caches import is_cached
from daekit.runtime.data import DataBuilder
from daekit.runtime.disk import checkpoints_at_end, require_space, require_writable
from daekit.runtime.found import Found
from daekit.runtime.generated import GeneratedSource, generated_sources
from daekit.runtime.kept import ahead
from daekit.runtime.models import ModelBuilder
from daekit.runtime.options import require_usable
from daekit.runtime.positions import require_positions, require_report_positions
from daekit.runtime.quiet import say
from daekit.runtime.student import require_cuttable, require_one_process
from daekit.runtime.trainer import training_arguments
from daekit.teachers.cache.rows import CacheRow, rows_of_examples
from daekit.trainers import DomainSFTConfig

_ASKING = ("mt_bench", "alpaca_eval")  # benchmarks whose questions go through a chat template


@dataclass(frozen=True)
class Prepared:
    """A recipe of which everything has been opened.

    Attributes:
        models: the models of the run; their rows, recipe and folder are those of the run.
        found: what is wrong with it.
        generated: the sources that a model writes.
        stages: the stages that are not complete yet and whose rows are there.
        waiting: of the other stages that are not complete: the sources that are to be written before they begin.
        suites: the suites of the report, which measure its models once they are trained.
        notes: what a user should know before the first step.
    """

    models: ModelBuilder
    found: Found
    generated: dict[str, GeneratedSource]
    stages: dict[str, stage_rows.PreparedStage] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    suites: list[suites.Prepared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(recipe: Recipe, allowed: Permissions = Permissions()) -> Prepared:
    """Open what the stages that are not complete yet, the report and the suites will need. Writes nothing.

    Weights are not loaded: models are known by their configs, their tokenizers and the headers of their files.

    Raises:
        UserError: everything that was found, at once.
    """
    found, data = Found(recipe.name), DataBuilder(recipe)
    with found.at("output_dir"):
        require_writable(data.folder.root)
    found.raise_if_any()
    stages = list(ahead(recipe))
    used = _sources(recipe, stages)
    for name in used:
        if recipe.sources[name].generated is None:
            with found.at(f"sources.{name}"):
                data.source(name)
    found.raise_if_any()  # a tokenizer may be trained on them, and none of what follows would be told about them
    with found.at("tokenizer"):
        _ = data.tokenizer
    found.raise_if_any()
    models = ModelBuilder(data, allowed)
    models.ahead = frozenset(stages)
    prepared = Prepared(models, found, generated_sources(models))
    for name in used:
        if name in prepared.generated:
            with found.at(f"sources.{name}"):
                _prepare_generated(prepared, name)
    for name in stages:
        _prepare_stage(prepared, name)
    _prepare_report(prepared)
    for index, suite in enumerate(recipe.evaluation.suites if recipe.evaluation is not None else ()):
        with found.at(f"evaluation.suites.{index}"):
            _prepare_suite(prepared, suite, f"evaluation.suites.{index}")
    found.raise_if_any()
    models.ahead = frozenset()
    return prepared


def complete_rows(prepared: Prepared, name: str) -> None:
    """Write the sources that a stage waits for, now that the stages before it are complete, and prepare it as ``prepare`` does.

    Raises:
        UserError: what ``GeneratedSource.write`` raises; everything that is found with the rows there.
    """
    waits, known = prepared.waiting.pop(name, []), len(prepared.notes)
    if not waits:
        return
    for source in waits:
        prepared.generated[source].write()
    _prepare_stage(prepared, name)
    for user, stage in prepared.models.recipe.stages.items():
        for key, spec in stage.models().items():
            with prepared.found.at(f"stages.{user}.{dotted(key)}"):
                _require_checkpoint(prepared, spec)
    _prepare_report(prepared)
    prepared.found.raise_if_any()
    say(*(f"note: {note}" for note in prepared.notes[known:]))


def _sources(recipe: Recipe, stages: list[str]) -> list[str]:
    """The sources that stages, tokenizer and report read, in the order of the file."""
    used = {name for stage in stages for name in _sources_of(recipe.stages[stage])}
    if recipe.evaluation is not None:
        used |= {*recipe.evaluation.sources}
    if recipe.tokenizer is not None and recipe.tokenizer.train is not None:
        used |= {*recipe.tokenizer.train.sources}
    return [name for name in recipe.sources if name in used]


def _sources_of(stage: StageSpec) -> dict[str, None]:
    """The sources that a stage trains on, and those that its student is cut with."""
    init = stage.student.init if stage.student is not None else None
    return dict.fromkeys([*stage.data.sources, *(init.calibration.sources if init is not None else ())])


def _prepare_generated(prepared: Prepared, name: str) -> None:
    """Read a generated source that is written, check one that is not."""
    source = prepared.generated[name]
    source.check()
    if source.find() is not None:
        prepared.models.data.source(name)
    else:
        stage_rows.require_rows_to_train_on(source)
        prepared.notes.append(f"sources.{name}: its rows are written before the first stage that needs them")


def _prepare_report(prepared: Prepared) -> None:
    """The report's models, and its rows if they are all written."""
    models, evaluation = prepared.models, prepared.models.recipe.evaluation
    if evaluation is None:
        return
    for each in evaluation.models:
        with prepared.found.at(f"evaluation.models.{each.name}"):
            _require_checkpoint(prepared, each)
            if each.name != STUDENT_AS_IT_WAS:  # it has been looked at with its stage
                models.look_at(each)
    if evaluation.sources and not any(models.data.is_unwritten(name) for name in evaluation.sources):
        with prepared.found.at("evaluation"):
            require_report_positions(models, evaluation)


def _prepare_suite(prepared: Prepared, suite: SuiteSpec, where: str) -> None:
    models, evaluation = prepared.models, prepared.models.recipe.evaluation
    baseline = suite.baseline or (evaluation and evaluation.baseline)
    place = {"output_dir": str(models.folder.suite(suite.name)), "baseline": baseline}
    ready = suites.prepare(suite.model_copy(update=place), suites.Options(allowed=models.allowed))
    prepared.suites.append(ready)
    asking = [name for name, benchmark in suite.benchmarks.items() if benchmark.type in _ASKING]
    if asking and models.tokenizer.chat_template is None:
        raise UserError(
            f"benchmarks.{asking[0]} asks the models of this run, and their tokenizer has no chat template; set "
            "tokenizer.chat_template, or measure them with suites that need none"
        )
    if models.ahead:
        prepared.notes.extend(f"{where}: {note}" for note in suites.require_askable(ready, models_to_come=True))


def _prepare_stage(prepared: Prepared, name: str) -> None:
    """Everything of one stage; what fails is noted, and what does not need it is still looked at."""
    models, found, where = prepared.models, prepared.found, f"stages.{name}"
    arguments: DomainSFTConfig | None = None
    with found.at(f"{where}.trainer"):
        arguments = training_arguments(models.recipe, name, models.folder.stage(name))
        unset_hf_deepspeed_config()  # they have set it, and ZeRO-3 would split models that have no weights here
    student = _prepare_models(prepared, name)
    if arguments is None:
        return
    with found.at(f"{where}.trainer"):
        require_usable(arguments, student)
    if student is not None:
        with found.at("output_dir"):
            require_space(models.folder.root, name, arguments, student)
    stage, ready = models.recipe.stages[name], None
    waits = [source for source in _sources_of(stage) if models.data.is_unwritten(source)]
    if waits:
        prepared.waiting[name] = waits
    with found.at(f"{where}.data"):
        if waits:
            stage_rows.require_of_unwritten(models.data, stage, arguments, prepared.generated)
        else:
            ready = stage_rows.rows_of(models.data, stage, arguments)
    if ready is not None:
        prepared.stages[name] = ready
        with found.at(where):
            stage_rows.require_other_teacher(stage, ready)
            require_positions(models, name, ready)
        prepared.notes.extend(f"{where}: {note}" for note in stage_rows.notes_on(models.data, stage, ready, student))
    if ready is not None or waits:
        _ask_servers(prepared, name, ready)


def _prepare_models(prepared: Prepared, name: str) -> PreTrainedModel | None:
    """The models of a stage. Returns its student on the meta device, with its adapter; None where it is not known yet."""
    models, found, stage, where = prepared.models, prepared.found, prepared.models.recipe.stages[name], f"stages.{name}"
    known = len(found)
    for key, spec in stage.models().items():
        with found.at(f"{where}.{dotted(key)}"):
            _require_checkpoint(prepared, spec)
            models.look_at(spec, stage if key[0] == "student" else None)
    for key, teacher in stage.teachers_by_key().items():
        if teacher.cache is not None and teacher.cache.path is not None and not is_cached(models, name, teacher):
            with found.at(f"{where}.{dotted(key)}.cache.path"):
                require_writable(Path(teacher.cache.path))
        for spec in teacher.models().values():
            if spec.device_map is not None and not (models.is_there(spec) and is_cached(models, name, teacher)):
                with found.at(f"{where}.{dotted(key)}"):
                    require_devices(spec.device_map, str(spec.path))
    with found.at(where):
        models.require_adapters_fit(name)
    student: PreTrainedModel | None = None
    with found.at(f"{where}.student"):
        init = models.student_spec(name).init
        if init is not None:
            require_one_process(models, name)
            if not any(models.data.is_unwritten(source) for source in init.calibration.sources):
                require_cuttable(models, name)
    with found.at(f"{where}.student"):
        student = models.without_weights(name)
    if len(found) == known:  # the configs can be read
        with found.at(f"{where}.loss"):
            models.require_comparable(name)
    if student is not None and stage.lora is not None:
        with found.at(f"{where}.lora"), torch.device("meta"):
            student = get_peft_model(student, lora_config(stage.lora, stage.student))
    return student


def _ask_servers(prepared: Prepared, name: str, ready: stage_rows.PreparedStage | None) -> None:
    """Ask each served teacher without a cache about its tokenizer and, once rows are ``ready``, the longest that follows it."""
    models, stage = prepared.models, prepared.models.recipe.stages[name]
    for key, spec in stage.teachers_by_key().items():
        if spec.kind != "server" or is_cached(models, name, spec):
            continue
        rows: Iterable[CacheRow] = ()
        if ready is not None:
            domains, longest = stage.domains_of(key, ready.counts), ready.longest
            mine = (row for row in ready.fitted[0].with_format("numpy") if row["domain"] in domains)
            rows = rows_of_examples(row for row in mine if len(row["input_ids"]) <= longest)
        with prepared.found.at(f"stages.{name}.{dotted(key)}"):
            models.served(spec).require_served(stage.loss, models.tokenizer, rows)


def _require_checkpoint(prepared: Prepared, spec: ModelSpec) -> None:
    """UserError for a checkpoint that a stage of this run will not have kept when it is over."""
    ready = prepared.stages.get(spec.stage or "")
    if spec.checkpoint is None or ready is None or spec.stage is None:
        return
    if prepared.models.folder.stage(spec.stage).is_begun:
        return  # what lies there, and what depends on the course of the run, is looked at when it is used
    kept = checkpoints_at_end(ready.arguments, sum(count.rows for count in ready.counts.values()))
    if kept is not None and spec.checkpoint not in kept:
        raise UserError(
            f"stage {spec.stage!r} will have no checkpoint-{spec.checkpoint}: with its save_strategy, save_steps and "
            f"save_total_limit it ends with {listed(f'checkpoint-{step}' for step in kept[-5:])}"
        )
