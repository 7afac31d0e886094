"""From a stage of a recipe to a trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from daekit.data.mixture import Mixture
from daekit.errors import UserError
from daekit.models.adapters import lora_config
from daekit.recipe.schema import Recipe
from daekit.runtime.caches import make_caches
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import StageFolder
from daekit.runtime.models import ModelBuilder
from daekit.runtime.preflight import held_out_rows
from daekit.trainers import (
    DAEConfig,
    DAETrainer,
    DomainSFTConfig,
    DomainSFTTrainer,
    KDConfig,
    KDTrainer,
)
from daekit.trainers.config import is_evaluated
from daekit.trainers.distributed import reads_parts
from daekit.trainers.progress import ProgressCallback


def build_trainer(
    recipe: Recipe, name: str, folder: StageFolder, data: DataBuilder, models: ModelBuilder
) -> tuple[KDTrainer, Mixture]:
    """The trainer of stage ``name``, and the rows that it trains on.

    Raises:
        UserError: from the rooms that read the data and load the models; what transformers and TRL say of options.
    """
    mixture = data.mixture(recipe.stages[name])
    with naming(f"stages.{name}"):
        trainer = _trainer_of(recipe, name, folder, data, models, mixture)
    trainer.remove_callback(PrinterCallback)
    callback: TrainerCallback = ProgressCallback(name)
    trainer.add_callback(callback)
    return trainer, mixture


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Make of what the libraries say of options, or of a package that is not installed, an error of the user at ``key``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{key}: {' '.join(str(error).split())}") from error


def cache_stage(
    recipe: Recipe, name: str, folder: StageFolder, data: DataBuilder, models: ModelBuilder, check: bool = False
) -> None:
    """Make what is missing of the caches of a stage's teachers, and train nothing; ``check`` compares some rows.

    Raises:
        UserError: see ``make_caches``.
    """
    given = _given(recipe, name, folder, data, models, data.mixture(recipe.stages[name]))
    held_out = held_out_rows(recipe, name, data)
    make_caches(recipe, name, models, given["args"], given["train_dataset"], given["eval_dataset"], held_out, check)


def _given(
    recipe: Recipe, name: str, folder: StageFolder, data: DataBuilder, models: ModelBuilder, mixture: Mixture
) -> dict[str, Any]:
    """What every trainer is given."""
    stage, arguments = recipe.stages[name], training_arguments(recipe, name, folder)
    return {
        "args": arguments,
        "train_dataset": mixture.dataset,
        "eval_dataset": data.validation(stage) if is_evaluated(arguments) else None,
        "processing_class": models.tokenizer,
        "peft_config": lora_config(stage.lora, stage.student) if stage.lora else None,
    }


def _trainer_of(
    recipe: Recipe, name: str, folder: StageFolder, data: DataBuilder, models: ModelBuilder, mixture: Mixture
) -> KDTrainer:
    stage, common = recipe.stages[name], _given(recipe, name, folder, data, models, mixture)
    models.require_adapters_fit(stage)
    given = common["args"], common["train_dataset"], common["eval_dataset"]
    caches = make_caches(recipe, name, models, *given, held_out_rows(recipe, name, data))
    args, split = common["args"], stage.type != "sft" and reads_parts(common["args"])
    student = models.student(recipe, name, args.seed, reads_parts(args, student=True, adapter=common["peft_config"]))
    if stage.type == "sft":
        return DomainSFTTrainer(student, **common)
    if stage.type == "kd":
        return KDTrainer(student, caches.get(("teacher",)) or models.teacher(stage.teacher, split), **common)
    live = {domain: spec for domain, spec in stage.teachers.items() if ("teachers", domain) not in caches}
    teachers: dict[str, Any] = models.teachers(live, split) | {
        str(key[1]): c for key, c in caches.items() if key[0] == "teachers"
    }
    reference = caches.get(("reference",)) or (models.teacher(stage.reference, split) if stage.reference else None)
    return DAETrainer(student, teachers, reference, **common)


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
