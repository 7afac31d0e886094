"""What the tests of adapters share: a base on disk, and adapters of it in directories, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from daekit.models.loading import load_model
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**changes: Any) -> LoraConfig:
    """A config whose first values make a difference."""
    defaults: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    return LoraConfig(task_type="CAUSAL_LM", **(defaults | changes))


def save_base(folder: Path, **fields: Any) -> Path:
    """A tiny model and its tokenizer."""
    tiny.model(**(dict(seed=1, hidden=64) | fields)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(base: Path, **how: Any) -> Any:
    """The base as daekit loads it: ``quantization="4bit"``, ``dtype="bfloat16"``..."""
    return load_model(ModelSpec(path=str(base), **how))


def save_adapter(folder: Path, base: Path, seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """An adapter of the base, not a no-op."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path) -> Any:
    """The base with the adapter in its weights, by PEFT alone."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
