"""What the trainers refuse before any work is done: what would change the objective, or fail later, without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel, PromptLearningConfig
from trl import SFTConfig

from daekit.data.preparation import first_row
from daekit.errors import UserError


def refuse_arguments(model: Any, args: SFTConfig, train_dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for arguments of an SFTTrainer that are not supported."""
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise UserError(
            "dataset_kwargs={'skip_prepare_dataset': True} is not supported: rows would get no domain and no length check. "
            "Leave it out: a tokenised data set (input_ids, labels) is taken as it is."
        )
    if arguments.get("compute_loss_func") is not None:
        raise UserError("compute_loss_func is not supported: the loss is the trainer's own, set by its config")
    configs = [arguments.get("peft_config"), *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise UserError("prompt-learning PEFT is not supported: virtual tokens have no counterpart in a teacher; use LoRA")
    if not isinstance(train_dataset, Dataset | IterableDataset):
        return  # SFTTrainer says what it wants
    if {"image", "images"} & first_row(train_dataset, "train").keys():
        raise UserError("the train data set has images: vision data is not supported; use a text-only data set")


def refuse_shared_stream(args: SFTConfig, name: str) -> None:
    """Raise UserError where several processes would evaluate a stream."""
    if args.world_size > 1 and not args.dataloader_drop_last:
        raise UserError(
            f"the {name} data set is a stream, evaluated by {args.world_size} processes: the last batch repeats rows to be "
            "full, and which ones cannot be told. Give a map-style Dataset (datasets.Dataset.from_list(list(stream)))."
        )
