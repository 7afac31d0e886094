"""What a recipe asks of this machine, before weights are read: attention implementations, checkpoints that are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from daekit.errors import UserError


def require_attention(config: PreTrainedConfig, implementation: str, path: str, trusted: bool = False) -> None:
    """Let transformers choose the attention of a model without weights: packages and devices that it needs must be here.

    Raises:
        UserError: FlashAttention that is not installed or finds no GPU, an unknown name, or one that only a cache can serve.
    """
    if implementation.startswith("paged|"):
        raise UserError(f"{path}: attn_implementation={implementation}: is for serving, with a paged cache; use sdpa or eager")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=implementation, trust_remote_code=trusted)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{path}: attn_implementation={implementation} does not run here ({_line(error)}) Install what is missing, or "
            "leave it out: transformers then takes sdpa where the model has it."
        ) from error


def require_gradient(implementation: str | None, device: torch.device, path: str) -> None:
    """UserError for a student whose attention has no backward pass on its device."""
    if implementation == "flex_attention" and device.type == "cpu":
        raise UserError(
            f"{path}: attn_implementation=flex_attention has no backward pass on a CPU, so a student cannot be trained with "
            "it; use sdpa"
        )


def settings_of(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """How the weights of a checkpoint were quantised before they were saved, by its config; empty for others."""
    fields = config if isinstance(config, Mapping) else vars(config)
    settings = fields.get("quantization_config") or {}
    return dict(settings if isinstance(settings, Mapping) else settings.to_dict())


def require_readable(settings: Mapping[str, Any], path: str) -> None:
    """Ask transformers whether a checkpoint quantised as ``settings`` say can be loaded here; it says what is missing.

    Raises:
        UserError: a package or a device that is missing, an unknown method.
    """
    if not settings:
        return
    try:
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, ValueError, TypeError, KeyError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise UserError(
            f"{path}: its weights are quantised already ({settings.get('quant_method')}) and cannot be loaded here "
            f"({_line(error)}) Install what is missing, or give an unquantised checkpoint: `quantization: 4bit` makes it small."
        ) from error


def require_trainable(settings: Mapping[str, Any], path: str, lora: bool) -> None:
    """UserError for a student, or what one is made of, that is quantised already and would be trained or saved whole.

    transformers dequantises some of these for a device that cannot run them, and quantises again when they are saved: the
    saved weights would not be the trained ones (measured of FP8), or could not be read (of MXFP4).
    """
    if settings and not lora:
        raise UserError(
            f"{path}: its weights are quantised already ({settings.get('quant_method')}): what is trained would be rounded to "
            "them again when it is saved. Train an adapter on it (`lora`, without `merge`), or give the 16-bit model."
        )


def in_one_dtype(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Give a model that was dequantised while it was loaded the dtype of its config, but for what it keeps in float32.

    transformers leaves what such a checkpoint holds in 16 bits as it is, beside dequantised weights in the dtype asked for.
    """
    if not settings or getattr(model, "is_quantized", False):
        return
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in exact):
            parameter.data = parameter.data.to(model.config.dtype)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
