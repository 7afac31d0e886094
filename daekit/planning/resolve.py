"""Finds the config of a recipe's model without weights and without the network: known shapes, directories, the hub's cache."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from daekit.errors import UserError
from daekit.models.hardware import settings_of
from daekit.models.vocabulary import vocabulary_size
from daekit.recipe.adapter_config import adapter_stage, holds_adapter, read_adapter_config
from daekit.recipe.schema import ModelSpec, Recipe, StudentSpec
from daekit.students.importance import config_of_shape, first_n
from daekit.students.shapes import Shape
from daekit.students.space import Window, space_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ResolvedModel:
    """All that is known of a model before it is loaded.

    Attributes:
        config: The config of transformers.
        dtype: The dtype of the weights that are not quantised.
        quantization: None, ``4bit`` or ``8bit``.
        compute_dtype: The dtype of the matrix products with quantised weights.
        attention: The attention implementation; None for transformers' choice. FlashAttention is planned as SDPA, which
            needs as much memory where there is no mask.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    quantization: str | None
    compute_dtype: torch.dtype
    attention: str | None = None


def resolve(recipe: Recipe, spec: ModelSpec) -> ResolvedModel:
    """What is known of a model of a recipe.

    Raises:
        UserError: A hub id is neither known nor in the cache, a directory holds no config, or a config is wrong.
    """
    config, own = _config_and_dtype(recipe, spec)
    dtype = _DTYPES.get(spec.dtype, own)
    attention = "sdpa" if spec.attn_implementation and "flash" in spec.attn_implementation else spec.attn_implementation
    quantization = spec.quantization or _stored_quantization(config, spec)
    return ResolvedModel(config, dtype, quantization, _DTYPES.get(spec.dtype, torch.bfloat16), attention)


def _config_and_dtype(recipe: Recipe, spec: ModelSpec) -> tuple[PreTrainedConfig, torch.dtype]:
    """(config, the dtype that ``auto`` stands for)."""
    if spec.stage is not None:
        return _result_of(recipe, spec.stage)
    if spec.config is not None:
        return _from_fields(_with_vocabulary(recipe, spec.config)), torch.float32
    if spec.init is not None:
        return _part_of_teacher(recipe, spec.init)
    assert spec.path is not None, "a model has a path, a stage or a config"
    return _from_path(spec)


def _result_of(recipe: Recipe, name: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """A stage's result is like its student; a LoRA adapter is merged into the base, which is not quantised then."""
    stage = recipe.stages[name]
    student = stage.student
    assert student is not None, "a resolved recipe names every student"
    origin = adapter_stage(student.adapter)
    if origin is not None:
        return _result_of(recipe, origin)
    resolved = resolve(recipe, student.model_copy(update={"dtype": "auto"}) if stage.lora else student)
    return resolved.config, resolved.dtype


def _part_of_teacher(recipe: Recipe, spec: StudentSpec) -> tuple[PreTrainedConfig, torch.dtype]:
    """A student that is cut out of its teacher.

    Of the shapes that a search may find this takes the one with most channels and neurons in all layers together: it needs
    most memory for activations. The number of parameters differs little, because the search bounds it.
    """
    if spec.with_ or spec.dense is not None or spec.keep_experts is not None:
        raise UserError(
            "a student that is made of experts is not planned. Make it with `daekit init`, and plan with the path that it "
            "prints in place of `from`"
        )
    teacher = resolve(recipe, spec.from_)
    config, search = teacher.config, spec.search
    if search is None:
        return config_of_shape(config, replace(Shape.of(config), **spec.shape)), teacher.dtype
    space = space_of(
        config, first_n(config), blocks=search.blocks, min_ratio=search.min_ratio, head_dims=search.head_dims or None
    )
    shape = max(
        space.shapes(Window(*search.parameters)),
        key=lambda shape: shape.num_hidden_layers * (shape.hidden_size + shape.intermediate_size),
    )
    return config_of_shape(config, shape), teacher.dtype


def _with_vocabulary(recipe: Recipe, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    tokenizer = recipe.tokenizer
    if "vocab_size" in fields or tokenizer is None:
        return fields
    if tokenizer.train is not None:
        return {"vocab_size": tokenizer.train.vocab_size, **fields}
    from daekit.data.tokenizer import load_tokenizer  # imports datasets

    return {"vocab_size": vocabulary_size(load_tokenizer(tokenizer)), **fields}


def _stored_quantization(config: PreTrainedConfig, spec: ModelSpec) -> str | None:
    """How a checkpoint that was quantised before it was saved lies in memory; UserError where that is not known."""
    settings = settings_of(config)
    if settings and (method := settings.get("quant_method")) != "bitsandbytes":
        raise UserError(f"{spec.path or spec.stage}: is quantised already ({method}); the memory of that is not planned")
    return ("8bit" if settings.get("load_in_8bit") else "4bit") if settings else None


@cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """Hub id -> its entry in ``resources/shapes.yaml``: ``config``, ``dtype``, ``parameters``."""
    text = (importlib.resources.files("daekit") / "resources" / "shapes.yaml").read_text(encoding="utf-8")
    return {name: entry for entry in yaml.safe_load(text) for name in entry["ids"]}


def _from_path(spec: ModelSpec) -> tuple[PreTrainedConfig, torch.dtype]:
    path = str(spec.path)
    directory = Path(path).expanduser()
    if holds_adapter(directory):
        config = read_adapter_config(directory)
        base = {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
        return _from_path(spec.model_copy(update=base))
    if path in known_shapes() and not directory.is_dir():
        entry = known_shapes()[path]
        return _from_fields(entry["config"]), _DTYPES[entry["dtype"]]
    try:
        config = AutoConfig.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: its shape is not known, and no config.json of it is here. Give a directory that holds config.json, "
            f"download that file once (`hf download {path} config.json`), or plan with one of the known models "
            "(daekit/resources/shapes.yaml)."
        ) from error
    # where it names none, transformers keeps the dtype of the weights
    return config, config.dtype or torch.float32


def _from_fields(fields: Mapping[str, Any]) -> PreTrainedConfig:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"config of a {model_type} model: {' '.join(str(error).split())}") from error
