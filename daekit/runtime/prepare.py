"""Everything that a run will need, opened before its first step: a run that begins is not ended later by what was wrong before.

``daekit check --deep`` is this function alone; ``daekit preview`` shows what it has prepared; a run goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.errors import UserError, listed
from daekit.evaluation import suites
from daekit.generation import Permissions
from daekit.models.adapters import lora_config
from daekit.models.placement import require_devices
from daekit.recipe.model import ModelSpec
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluationSpec, Recipe, StageSpec
from daekit.recipe.validation import dotted
from daekit.runtime.caches import is_cached
from daekit.runtime.data import DataBuilder
from daekit.runtime.disk import checkpoints_at_end, require_space, require_writable
from daekit.runtime.folders import RunFolder
from daekit.runtime.found import Found
from daekit.runtime.generated import GeneratedSource, generated_sources, write_sources
from daekit.runtime.kept import ahead
from daekit.runtime.models import ModelBuilder
from daekit.runtime.options import require_usable
from daekit.runtime.positions import require_positions, require_report_positions
from daekit.runtime.stage_rows import (
    PreparedStage,
    notes_on,
    require_other_teacher,
    require_room,
    rows_of,
)
from daekit.runtime.student import require_cuttable, require_one_process
from daekit.runtime.trainer import training_arguments
from daekit.runtime.unwritten import require_of_unwritten, require_rows_to_train_on
from daekit.teachers.cache.rows import CacheRow, rows_of_examples
from daekit.trainers import DomainSFTConfig

_ASKING = ("mt_bench", "alpaca_eval")  # benchmarks whose questions go through a chat template


@dataclass(frozen=True)
class Prepared:
    """A recipe of which everything has been opened.

    Attributes:
        stages: the stages that are not complete yet and whose rows are there.
        generated: the sources that a model writes.
        waiting: of the other stages that are not complete: the sources that are to be written before they begin.
        suites: the suites of the report, which measure its models once they are trained.
        notes: what a user should know before the first step.
    """

    recipe: Recipe
    folder: RunFolder
    data: DataBuilder
    models: ModelBuilder
    stages: dict[str, PreparedStage] = field(default_factory=dict)
    generated: dict[str, GeneratedSource] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    suites: list[suites.Prepared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(recipe: Recipe, allowed: Permissions = Permissions()) -> Prepared:
    """Open what the stages that are not complete yet, the report and the suites will need. Writes nothing.

    Weights are not loaded: models are known by their configs, their tokenizers and the headers of their files.

    Raises:
        UserError: everything that was found, at once.
    """
    found, folder = Found(recipe.name), RunFolder(Path(recipe.output_dir))
    with found.at("output_dir"):
        require_writable(folder.root)
    found.raise_if_any()
    data = DataBuilder(recipe, folder)
    stages = list(ahead(recipe, folder))
    used = _sources(recipe, stages)
    for name in used:
        if recipe.sources[name].generated is None:
            with found.at(f"sources.{name}"):
                data.source(name)
    if found:  # a tokenizer may be trained on them, and none of what follows would be told about them
        found.raise_if_any()
    with found.at("tokenizer"):
        _ = data.tokenizer
    found.raise_if_any()
    prepared = Prepared(recipe, folder, data, ModelBuilder(folder, data.tokenizer))
    prepared.models.ahead, prepared.models.allowed = frozenset(stages), allowed
    longest = _prepare_generated(prepared, used, allowed, found)
    for name in stages:
        _prepare_stage(prepared, name, longest, found)
    if recipe.evaluation is not None:
        _prepare_evaluation(prepared, recipe.evaluation, allowed, found)
    found.raise_if_any()
    prepared.models.ahead = frozenset()
    return prepared


def _prepare_generated(prepared: Prepared, used: list[str], allowed: Permissions, found: Found) -> dict[str, int]:
    """Read the generated sources that are written, check the others. Returns the tokens of the longest row of those at most."""
    prepared.generated.update(generated_sources(prepared.recipe, prepared.data, prepared.models, allowed))
    longest = {}
    for name in (name for name in used if name in prepared.generated):
        with found.at(f"sources.{name}"):
            longest[name] = 0
            most = prepared.generated[name].check()
            if prepared.generated[name].find() is None:
                longest[name] = most
                require_rows_to_train_on(prepared.generated[name])
                prepared.notes.append(f"sources.{name}: its rows are written before the first stage that needs them")
            else:
                del longest[name]
                prepared.data.source(name)
    return longest


def complete_rows(prepared: Prepared, name: str, device: torch.device) -> None:
    """Write the sources that a stage waits for, now that the stages before it are complete, and prepare it as ``prepare`` does.

    Raises:
        UserError: what ``GeneratedSource.write`` raises; everything that is found with the rows there.
    """
    waits = prepared.waiting.pop(name, None)
    if waits is None:
        return
    write_sources([prepared.generated[each] for each in waits], device)
    recipe, found, known = prepared.recipe, Found(prepared.recipe.name), len(prepared.notes)
    _prepare_stage(prepared, name, {}, found)
    for user, stage in recipe.stages.items():
        for key, spec in stage.models().items():
            with found.at(f"stages.{user}.{dotted(key)}"):
                _require_checkpoint(prepared, spec)
    if recipe.evaluation is not None:
        _prepare_report(prepared, recipe.evaluation, found)
    found.raise_if_any()
    for note in prepared.notes[known:] if PartialState().is_main_process else ():
        print(f"note: {note}", flush=True)


def _prepare_evaluation(prepared: Prepared, evaluation: EvaluationSpec, allowed: Permissions, found: Found) -> None:
    """The report and the suites."""
    _prepare_report(prepared, evaluation, found)
    for index, suite in enumerate(evaluation.suites):
        with found.at(f"evaluation.suites.{index}"):
            place = {"output_dir": str(prepared.folder.suite(suite.name)), "baseline": suite.baseline or evaluation.baseline}
            prepared.suites.append(suites.prepare(suite.model_copy(update=place), suites.Options(allowed=allowed)))
            asking = [name for name, benchmark in suite.benchmarks.items() if benchmark.type in _ASKING]
            if asking and prepared.data.tokenizer.chat_template is None:
                raise UserError(
                    f"benchmarks.{asking[0]} asks the models of this run, and their tokenizer has no chat template; set "
                    "tokenizer.chat_template, or measure them with suites that need none"
                )
            if prepared.models.ahead:
                notes = suites.require_askable(prepared.suites[-1], models_to_come=True)
                prepared.notes.extend(f"evaluation.suites.{index}: {note}" for note in notes)


def _prepare_report(prepared: Prepared, evaluation: EvaluationSpec, found: Found) -> None:
    """The report's models, and its rows if they are all written."""
    for each in evaluation.models:
        with found.at(f"evaluation.models.{each.name}"):
            _require_checkpoint(prepared, each)
            if each.name != STUDENT_AS_IT_WAS:  # it has been looked at with its stage
                prepared.models.look_at(each)
    if all(name not in prepared.generated or name in prepared.data.written for name in evaluation.sources):
        with found.at("evaluation"):
            require_report_positions(prepared.recipe, evaluation, prepared.data.evaluation_sets, prepared.models)


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


def _prepare_stage(prepared: Prepared, name: str, longest: Mapping[str, int], found: Found) -> None:
    """Everything of one stage; what fails is noted, and what does not need it is still looked at."""
    recipe, data, models = prepared.recipe, prepared.data, prepared.models
    stage, where = recipe.stages[name], f"stages.{name}"
    arguments: DomainSFTConfig | None = None
    with found.at(f"{where}.trainer"):
        arguments = training_arguments(recipe, name, prepared.folder.stage(name))
        unset_hf_deepspeed_config()  # they have set it, and ZeRO-3 would split models that have no weights here
    known = len(found)
    for key, spec in stage.models().items():
        with found.at(f"{where}.{dotted(key)}"):
            _require_checkpoint(prepared, spec)
            models.look_at(spec, stage if key[0] == "student" else None)
    for key, teacher in stage.teachers_by_key().items():
        if teacher.cache is not None and teacher.cache.path is not None and not is_cached(recipe, name, models, teacher):
            with found.at(f"{where}.{dotted(key)}.cache.path"):
                require_writable(Path(teacher.cache.path))
        for spec in teacher.models().values():
            if spec.device_map is None or (models.is_there(spec) and is_cached(recipe, name, models, teacher)):
                continue
            with found.at(f"{where}.{dotted(key)}"):
                require_devices(spec.device_map, str(spec.path))
    with found.at(where):
        models.require_adapters_fit(stage)
    if stage.student is not None and stage.student.init is not None:
        with found.at(f"{where}.student"):
            require_one_process(recipe, name, prepared.folder)
            if not longest.keys() & {*stage.student.init.calibration.sources}:
                require_cuttable(recipe, name, data, models)
    student: PreTrainedModel | None = None
    with found.at(f"{where}.student"):
        student = models.without_weights(recipe, name)
    if len(found) == known:  # the configs can be read
        with found.at(f"{where}.loss"):
            models.require_comparable(recipe, name)
    if student is not None and stage.lora is not None:
        with found.at(f"{where}.lora"), torch.device("meta"):
            student = get_peft_model(student, lora_config(stage.lora, stage.student))
    if arguments is None:
        return
    with found.at(f"{where}.trainer"):
        require_usable(arguments, student)
    if student is not None:
        with found.at("output_dir"):
            require_space(prepared.folder.root, name, arguments, student)
    if waits := [source for source in _sources_of(stage) if source in longest]:
        prepared.waiting[name] = waits
        with found.at(f"{where}.data"):
            require_room(stage, arguments, data, {source: longest[source] for source in waits})
            require_of_unwritten(stage, arguments, data, {source: prepared.generated[source] for source in waits})
        _ask_servers(prepared, name, None, found)
        return
    ready: PreparedStage | None = None
    with found.at(f"{where}.data"):
        ready = rows_of(stage, arguments, data)
    if ready is not None:
        with found.at(where):
            require_other_teacher(stage, ready)
            require_positions(recipe, name, ready, models)
        prepared.stages[name] = ready
        _ask_servers(prepared, name, ready, found)
        prepared.notes.extend(f"{where}: {note}" for note in notes_on(stage, ready, data, student))


def _ask_servers(prepared: Prepared, name: str, ready: PreparedStage | None, found: Found) -> None:
    """Ask each served teacher without a cache about its tokenizer and, once rows are ``ready``, the longest that follows it."""
    recipe, models = prepared.recipe, prepared.models
    stage = recipe.stages[name]
    for key, spec in stage.teachers_by_key().items():
        if spec.kind != "server" or is_cached(recipe, name, models, spec):
            continue
        rows: Iterable[CacheRow] = ()
        if ready is not None:
            domains, longest = stage.domains_of(key, ready.counts), ready.longest
            mine = (row for row in ready.mixture.dataset.with_format("numpy") if row["domain"] in domains)
            rows = rows_of_examples(row for row in mine if len(row["input_ids"]) <= longest)
        with found.at(f"stages.{name}.{dotted(key)}"):
            models.served(spec).require_served(stage.loss, models.tokenizer, rows)


def _require_checkpoint(prepared: Prepared, spec: ModelSpec) -> None:
    """UserError for a checkpoint that a stage of this run will not have kept when it is over."""
    ready = prepared.stages.get(spec.stage or "")
    if spec.checkpoint is None or ready is None or spec.stage is None:
        return
    if prepared.folder.stage(spec.stage).is_begun:
        return  # what lies there, and what depends on the course of the run, is looked at when it is used
    kept = checkpoints_at_end(ready.arguments, sum(count.rows for count in ready.counts.values()))
    if kept is not None and spec.checkpoint not in kept:
        raise UserError(
            f"stage {spec.stage!r} will have no checkpoint-{spec.checkpoint}: with its save_strategy, save_steps and "
            f"save_total_limit it ends with {listed(f'checkpoint-{step}' for step in kept[-5:])}"
        )
