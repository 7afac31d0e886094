"""Validation of a trainer's arguments before any work is done: what would change the objective, or fail later, in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig

from daekit.data.columns import first_row
from daekit.errors import UserError
from daekit.models.adapters import require_targets
from daekit.models.experts import QuantisedExperts

# what PEFT takes for the experts of transformers 5: their names, and those of the modules that they were in transformers 4
_EXPERT_NAMES = {"gate_up_proj": ("w1", "w3", "gate_proj", "up_proj"), "down_proj": ("w2",), "up_proj": ()}


def refuse_arguments(model: Any, teacher: Any, args: Any, train_dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for arguments of a trainer, ``arguments`` those of SFTTrainer, that are not supported."""
    objective = args.objective()
    for name in ("prediction_weight", "attention_weight", "hidden_weight"):  # 0 in silence without a teacher
        if teacher is None and (value := getattr(objective, name)):
            raise UserError(
                f"{name}={value}: compares the student with a teacher, but there is none. Give a teacher, or train on the "
                f"labels alone: a DomainSFTConfig, or ce_weight=1 and {name}=0."
            )
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise UserError(
            "dataset_kwargs={'skip_prepare_dataset': True} is not supported: rows would get no domain and no length check. "
            "Leave it out: a tokenised data set (input_ids, labels) is taken as it is."
        )
    if arguments.get("compute_loss_func") is not None:
        raise UserError("compute_loss_func is not supported: the loss is the trainer's own, set by its config")
    if not isinstance(model, PeftModel) and arguments.get("peft_config") is None:
        _refuse_requantised(model)
    configs = [arguments.get("peft_config"), *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise UserError("prompt-learning PEFT is not supported: virtual tokens have no counterpart in a teacher; use LoRA")
    if not isinstance(train_dataset, Dataset | IterableDataset):
        return  # SFTTrainer says what it wants
    if {"image", "images"} & first_row(train_dataset, "train").keys():
        raise UserError("the train data set has images: vision data is not supported; use a text-only data set")


def _refuse_requantised(model: Any) -> None:
    """A model that was dequantised when it was loaded: transformers would round its trained weights when it saves them."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    if any(type(step).__name__.endswith("Dequantize") for each in conversions for step in getattr(each, "operations", ())):
        raise UserError(
            f"{model.config.name_or_path}: was loaded from quantised weights: what is trained would be rounded to them again "
            "when it is saved. Give a peft_config, or the 16-bit model."
        )


def refuse_adapter(model: nn.Module, config: PeftConfig | None) -> None:
    """Raise UserError for a new adapter that does not fit the student."""
    if not isinstance(config, LoraConfig):
        return
    if paths := [path for path, module in model.named_modules() if isinstance(module, QuantisedExperts)]:
        _refuse_on_quantised_experts(paths, config)
    if isinstance(model, PreTrainedModel):
        require_targets(model, config)


def _refuse_on_quantised_experts(paths: list[str], config: LoraConfig) -> None:
    """PEFT would leave the experts at these paths out without a word ("all-linear" may)."""
    chosen, parameters = config.target_modules or (), config.target_parameters or ()
    names = set(paths)
    for path in paths:
        layer, _, leaf = path.rpartition(".")
        names |= {f"{layer}.{old}" for old in _EXPERT_NAMES[leaf]}
    if isinstance(chosen, str):
        wanted = [] if chosen.lower() == "all-linear" else [chosen for name in names if re.fullmatch(chosen, name)]
    else:
        wanted = [target for target in chosen if any(f".{name}".endswith(f".{target}") for name in names)]
    wanted += [target for target in parameters if any(f".{path}".endswith(f".{target}") for path in paths)]
    if wanted:
        raise UserError(
            f"peft_config: {min(wanted)!r} names experts, which are quantised: an adapter on them is not supported (each "
            "product would need its weight whole). Name other modules, 'all-linear' (which leaves quantised experts out), or "
            "load the model without quantization."
        )


def refuse_shared_stream(args: SFTConfig, name: str) -> None:
    """Raise UserError where several processes would evaluate a stream."""
    if args.world_size > 1 and not args.dataloader_drop_last:
        raise UserError(
            f"the {name} data set is a stream, evaluated by {args.world_size} processes: the last batch repeats rows to be "
            "full, and which ones cannot be told. Give a map-style Dataset (datasets.Dataset.from_list(list(stream)))."
        )
