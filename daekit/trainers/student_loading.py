"""Students: weights loaded by TRL's own way, but whole; tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from daekit.errors import UserError
from daekit.models.loading import ALWAYS, load_tokenizer_of, load_whole
from daekit.recipe.schema import ModelSpec


def load_student(path: str, args: SFTConfig, quantization_config: Any = None) -> PreTrainedModel:
    """Load a student as SFTTrainer does (``args.model_init_kwargs``; float32 unless told otherwise), and whole.

    Raises:
        UserError: weights that are missing, of another shape, or a pickle; ``quantization_config`` given twice.
    """
    arguments = dict(args.model_init_kwargs or {})
    for name, value in ALWAYS.items():
        if arguments.pop(name, value) != value:
            raise UserError(
                f"model_init_kwargs={{{name!r}: {args.model_init_kwargs[name]!r}}} is not supported: students are loaded from "
                "whole safetensors files only. Leave it out."
            )
    if quantization_config is not None:
        if "quantization_config" in arguments:
            raise UserError("quantization_config is given twice, to the trainer and in model_init_kwargs: keep one")
        arguments["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        arguments["device_map"] = None  # "auto" would spread the student over the devices of the other ranks
    arguments.setdefault("trust_remote_code", args.trust_remote_code)
    return load_whole(create_model_from_path, path, arguments)


def tokenizer_of(model: Any, args: SFTConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a student, which is a path or a model; UserError if there is none."""
    if not isinstance(model, str):
        if not model.config._name_or_path:
            raise UserError("processing_class is missing: the student was not loaded from a directory that holds its tokenizer")
        return load_tokenizer_of(ModelSpec(path=model.config._name_or_path))
    return load_tokenizer_of(spec_of(model, args))


def spec_of(path: str, args: SFTConfig | None) -> ModelSpec:
    """Which model a student's path means, as far as config and tokenizer depend on it."""
    arguments: Mapping[str, Any] = (args.model_init_kwargs if args is not None else None) or {}
    trusted = arguments.get("trust_remote_code", args is not None and args.trust_remote_code)
    return ModelSpec(path=path, revision=arguments.get("revision"), trust_remote_code=trusted)


def name_of(model: Any) -> str:
    """The last part of a student's path; its type where it has none."""
    path = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
    return path.rstrip("/").split("/")[-1]
