"""One stage of a recipe: its student is made or loaded, trained or resumed, and saved with where it came from."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.data.mixture import Mixture
from daekit.files import write_json
from daekit.models.loading import load_model
from daekit.models.placement import free_memory
from daekit.models.sharded import shape_of
from daekit.recipe import sharing_notes, stage_key, to_yaml
from daekit.recipe.schema import ModelSpec, Recipe
from daekit.report.provenance import commit, versions
from daekit.runtime.folders import StageFolder, files_of, read_file
from daekit.runtime.preflight import compare_experts
from daekit.runtime.prepare import Prepared
from daekit.runtime.preview import stage_lines
from daekit.runtime.signals import SaveOnSignal, StopRequest
from daekit.runtime.student import build_student
from daekit.runtime.trainer import build_trainer
from daekit.trainers import KDTrainer
from daekit.trainers.machines import by_main


def run_stage(prepared: Prepared, name: str, state: PartialState, stop: StopRequest) -> None:
    """Train a stage that is not complete, from its newest checkpoint if it has one. Every rank calls it.

    Raises:
        UserError: anything that is wrong with data, models or settings.
        Stopped: a signal came; what was trained is in a checkpoint.
    """
    recipe, folder, data, models = prepared.recipe, prepared.folder, prepared.data, prepared.models
    stage, start = folder.stage(name), time.perf_counter()
    if state.is_main_process:
        stage.root.mkdir(parents=True, exist_ok=True)
        write_json(stage.key, stage_key(recipe, name))
    state.wait_for_everyone()
    student = recipe.stages[name].student
    if student is not None and student.init is not None:
        build_student(recipe, name, folder, data, models, state.device)
        free_memory()
    trainer, mixture = build_trainer(recipe, name, stage, data, models)
    trainer.add_callback(SaveOnSignal(stop))
    if state.is_main_process:
        print(_heading(prepared, name, trainer), flush=True)
    resume = by_main(lambda: bool(stage.checkpoints))
    preflight, lines = compare_experts(recipe, name, stage, data, trainer)
    if state.is_main_process and preflight:
        write_json(stage.preflight, preflight)
        print("\n".join(lines), flush=True)
    with stop.saving():
        trainer.train(resume_from_checkpoint=resume)
    _save_result(recipe, name, stage, trainer, state)
    provenance = _provenance(trainer, mixture)  # all ranks: sharded weights are gathered to be hashed
    if state.is_main_process:
        facts = {
            "stage": name,
            "seconds": round(time.perf_counter() - start, 1),
            "resumed": resume,
            "log_history": trainer.state.log_history,
        }
        if stage.preflight.is_file():
            facts["preflight"] = read_file(stage.preflight, delete=stage.preflight)
        (stage.model / "recipe.yaml").write_text(to_yaml(recipe))
        write_json(stage.model / "provenance.json", provenance)
        files = files_of(stage.root, [stage.model, stage.adapter])
        write_json(stage.done, facts | provenance | {"files": files})
        print(f"[{name}] complete in {facts['seconds']:.0f} s -> {stage.model}", flush=True)


def _save_result(recipe: Recipe, name: str, stage: StageFolder, trainer: KDTrainer, state: PartialState) -> None:
    """Save the student; what a shorter or damaged result has left goes first."""
    if state.is_main_process:
        for folder in (stage.model, stage.adapter):
            shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    lora = recipe.stages[name].lora
    merge = lora is not None and lora.merge
    trainer.save_model(str(stage.adapter if merge else stage.model))
    unset_hf_deepspeed_config()  # what is loaded from here on belongs to one rank; ZeRO-3 would split it over all
    if merge and trainer.args.should_save:
        load_model(ModelSpec(path=str(stage.adapter))).save_pretrained(stage.model)
        trainer.processing_class.save_pretrained(stage.model)


def _heading(prepared: Prepared, name: str, trainer: KDTrainer) -> str:
    trained = sum(shape_of(p).numel() for p in trainer.model.parameters() if p.requires_grad)
    rows, type_ = len(prepared.stages[name].mixture.dataset), prepared.recipe.stages[name].type
    lines = [f"[{name}] {type_}: {trained:,} trained parameters, {rows:,} rows", *stage_lines(prepared, name)]
    notes = [note for note in sharing_notes(prepared.recipe) if note.startswith(f"stages.{name}.")]
    return "\n".join([*lines, *(f"    note: {note}" for note in notes)])


def _provenance(trainer: KDTrainer, mixture: Mixture) -> dict[str, Any]:
    return {
        "versions": versions(),
        "commit": commit(),
        "run": trainer.checkpoints.facts(),
        "mixture": [asdict(use) for use in mixture.table],
        "rows": {name: {d: asdict(c) for d, c in counts.items()} for name, counts in trainer.data_counts.items()},
    }
