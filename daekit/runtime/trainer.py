"""From a stage of a recipe to a trainer that is ready to run."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback

from daekit.data.mixture import Mixture
from daekit.models.adapters import lora_config
from daekit.protocol import Teacher
from daekit.recipe.schema import Recipe
from daekit.runtime.caches import make_caches
from daekit.runtime.folders import StageFolder
from daekit.runtime.found import naming
from daekit.runtime.models import ModelBuilder
from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer, KDConfig, KDTrainer
from daekit.trainers.config import is_evaluated
from daekit.trainers.distributed import reads_parts
from daekit.trainers.progress import ProgressCallback


def build_trainer(models: ModelBuilder, name: str) -> tuple[KDTrainer, Mixture]:
    """The trainer of stage ``name``, and the rows that it trains on.

    Raises:
        UserError: from the rooms that read the data and load the models; what transformers and TRL say of options.
    """
    mixture = models.data.mixture(models.recipe.stages[name])
    with naming(f"stages.{name}"):
        trainer = _trainer_of(models, name, mixture)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(name))
    return trainer, mixture


def cache_stage(models: ModelBuilder, name: str, check: bool = False) -> None:
    """Make what is missing of the caches of a stage's teachers, and train nothing; ``check`` compares some rows.

    Raises:
        UserError: see ``make_caches``.
    """
    make_caches(models, name, _given(models, name, models.data.mixture(models.recipe.stages[name])), check)


def _given(models: ModelBuilder, name: str, mixture: Mixture) -> dict[str, Any]:
    """What every trainer is given."""
    stage, arguments = models.recipe.stages[name], training_arguments(models.recipe, name, models.folder.stage(name))
    return {
        "args": arguments,
        "train_dataset": mixture.dataset,
        "eval_dataset": models.data.validation(stage) if is_evaluated(arguments) else None,
        "processing_class": models.tokenizer,
        "peft_config": lora_config(stage.lora, stage.student) if stage.lora else None,
    }


def _trainer_of(models: ModelBuilder, name: str, mixture: Mixture) -> KDTrainer:
    stage, given = models.recipe.stages[name], _given(models, name, mixture)
    models.require_adapters_fit(name)
    caches = make_caches(models, name, given)
    args, split = given["args"], stage.type != "sft" and reads_parts(given["args"])
    student = models.student(name, reads_parts(args, student=True, adapter=given["peft_config"]))
    if stage.type == "sft":
        return DomainSFTTrainer(student, **given)
    if stage.type == "kd":
        return KDTrainer(student, caches.get(("teacher",)) or models.teacher(stage.teacher, split), **given)
    live = {domain: spec for domain, spec in stage.teachers.items() if ("teachers", domain) not in caches}
    cached: dict[str, Teacher] = {str(key[1]): cache for key, cache in caches.items() if key[0] == "teachers"}
    reference = caches.get(("reference",)) or (models.teacher(stage.reference, split) if stage.reference else None)
    return DAETrainer(student, models.teachers(live, split) | cached, reference, **given)


def training_arguments(recipe: Recipe, name: str, folder: StageFolder) -> DomainSFTConfig:
    """The config of a stage's trainer; TRL and transformers raise what they have against it."""
    stage = recipe.stages[name]
    arguments: dict[str, Any] = {
        "output_dir": str(folder.root),
        "seed": recipe.seed_of(name),
        "run_name": f"{recipe.name}/{folder.root.name}",
        "disable_tqdm": True,  # ProgressCallback says more
        "overlong": stage.overlong,
    } | stage.trainer
    arguments |= {"assistant_only_loss": False, "completion_only_loss": None}  # the rows say it: they are tokenised
    if stage.type == "sft":
        return DomainSFTConfig(**arguments)
    arguments["teacher_max_length"] = stage.teacher_max_length
    arguments["select"] = stage.select and stage.select.model_dump()
    if stage.type == "kd":
        return KDConfig(**arguments, **KDConfig.settings(stage.loss))
    return DAEConfig(**arguments, **KDConfig.settings(stage.loss), reference_domains=list(stage.reference_domains))
