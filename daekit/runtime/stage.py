"""One stage of a recipe: its student is made or loaded, trained or resumed, and saved with where it came from."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict

from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.files import write_json
from daekit.models.loading import load_model
from daekit.models.placement import free_memory
from daekit.models.sharded import shape_of
from daekit.recipe import sharing_notes, stage_key, to_yaml
from daekit.recipe.schema import ModelSpec
from daekit.report.provenance import commit, versions
from daekit.runtime.folders import files_of, read_file
from daekit.runtime.models import ModelBuilder
from daekit.runtime.preflight import compare_experts
from daekit.runtime.prepare import Prepared
from daekit.runtime.preview import stage_lines
from daekit.runtime.quiet import say
from daekit.runtime.signals import SaveOnSignal, StopRequest
from daekit.runtime.student import build_student
from daekit.runtime.trainer import build_trainer
from daekit.trainers import KDTrainer
from daekit.trainers.machines import by_main


def run_stage(prepared: Prepared, name: str, stop: StopRequest) -> None:
    """Train a stage that is not complete, from its newest checkpoint if it has one. Every rank calls it.

    Raises:
        UserError: anything that is wrong with data, models or settings.
        Stopped: a signal came; what was trained is in a checkpoint.
    """
    models, state, start = prepared.models, PartialState(), time.perf_counter()
    recipe, stage = models.recipe, models.folder.stage(name)
    if state.is_main_process:
        write_json(stage.key, stage_key(recipe, name))
    state.wait_for_everyone()
    if models.student_spec(name).init is not None:
        build_student(models, name)
        free_memory()
    trainer, mixture = build_trainer(models, name)
    trainer.add_callback(SaveOnSignal(stop))
    say(*_heading(prepared, name, trainer))
    resume = by_main(lambda: bool(stage.checkpoints))
    preflight, lines = compare_experts(models, name, trainer)
    if state.is_main_process and preflight:
        write_json(stage.preflight, preflight)
        say(*lines)
    with stop.saving():
        trainer.train(resume_from_checkpoint=resume)
    _save_result(models, name, trainer)
    provenance = {
        "versions": versions(),
        "commit": commit(),
        "run": trainer.checkpoints.facts(),  # all ranks: sharded weights are gathered to be hashed
        "mixture": [asdict(use) for use in mixture.table],
        "rows": {split: {domain: asdict(c) for domain, c in counts.items()} for split, counts in trainer.data_counts.items()},
    }
    if state.is_main_process:
        seconds = round(time.perf_counter() - start, 1)
        facts = {"stage": name, "seconds": seconds, "resumed": resume, "log_history": trainer.state.log_history}
        if stage.preflight.is_file():
            facts["preflight"] = read_file(stage.preflight)
        (stage.model / "recipe.yaml").write_text(to_yaml(recipe))
        write_json(stage.model / "provenance.json", provenance)
        files = files_of(stage.root, [stage.model, stage.adapter])
        write_json(stage.done, facts | provenance | {"files": files})
        say(f"[{name}] complete in {seconds:.0f} s -> {stage.model}")


def _save_result(models: ModelBuilder, name: str, trainer: KDTrainer) -> None:
    """Save the student; what a shorter or damaged result has left goes first."""
    stage, lora, state = models.folder.stage(name), models.recipe.stages[name].lora, PartialState()
    if state.is_main_process:
        for folder in (stage.model, stage.adapter):
            shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    merge = lora is not None and lora.merge
    trainer.save_model(str(stage.adapter if merge else stage.model))
    unset_hf_deepspeed_config()  # what is loaded from here on belongs to one rank; ZeRO-3 would split it over all
    if merge and trainer.args.should_save:
        load_model(ModelSpec(path=str(stage.adapter))).save_pretrained(stage.model)
        trainer.processing_class.save_pretrained(stage.model)


def _heading(prepared: Prepared, name: str, trainer: KDTrainer) -> list[str]:
    recipe, rows = prepared.models.recipe, len(prepared.stages[name].mixture.dataset)
    trained = sum(shape_of(p).numel() for p in trainer.model.parameters() if p.requires_grad)
    heading = f"[{name}] {recipe.stages[name].type}: {trained:,} trained parameters, {rows:,} rows"
    notes = [f"    note: {note}" for note in sharing_notes(recipe) if note.startswith(f"stages.{name}.")]
    return [heading, *stage_lines(prepared, name), *notes]
