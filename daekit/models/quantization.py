"""Quantised weights: bitsandbytes settings, what share is really quantised, and weights that stay as they were loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from daekit.environment import rank
from daekit.errors import UserError
from daekit.models.experts import QuantisedExperts
from daekit.recipe.schema import ModelSpec

_MOSTLY = 0.5


def quantization_config(spec: ModelSpec) -> BitsAndBytesConfig:
    """bitsandbytes settings: nf4 with double quantisation, computing in ``spec.dtype`` (``auto``: bfloat16), or 8 bits."""
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype),
    )


def bits_of(config: BitsAndBytesConfig) -> str:
    """What a recipe calls these settings."""
    return "8bit" if config.load_in_8bit else "4bit"


def require_supported(config: BitsAndBytesConfig, device: torch.device, path: str) -> None:
    """Try the quantisation on a small matrix, so that a device that cannot do it says so (UserError) before the load."""
    try:
        import bitsandbytes as bnb

        if device.type not in bnb.supported_torch_devices:
            raise RuntimeError(f"it supports {', '.join(sorted(bnb.supported_torch_devices))}")
        kind = bnb.nn.Linear8bitLt if config.load_in_8bit else bnb.nn.Linear4bit
        options = {"has_fp16_weights": False} if config.load_in_8bit else {"quant_type": config.bnb_4bit_quant_type}
        dtype = torch.float16 if config.load_in_8bit else config.bnb_4bit_compute_dtype
        with torch.no_grad():
            kind(64, 64, bias=False, **options).to(device)(torch.ones(1, 64, device=device, dtype=dtype))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: quantization={bits_of(config)} is done by bitsandbytes, which does not run on {device.type} here "
            f"({reason}). Install a build of bitsandbytes for this device, or load the model without quantization."
        ) from error


def rank_device() -> torch.device:
    """The device of this process: its own GPU where there are some."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, devices = rank(local=True), torch.cuda.device_count()
    if devices > 1 and local >= devices:
        raise UserError(f"process {local} of this machine has no GPU: there are {devices}; launch at most that many processes")
    return torch.device("cuda", local if devices > 1 else 0)  # a launcher may show each process its own GPU only


@dataclass(frozen=True)
class Stored:
    """How one weight (of a matrix or of all experts of a layer) is stored."""

    values: int  # parameters that it stands for
    bytes: int  # with its scales
    quantised: bool  # in 4 or 8 bits
    ends: bool = False  # it belongs to embeddings or output head, which stay as they are under every quantisation


def stored_weights(model: PreTrainedModel) -> Iterator[Stored]:
    """Every weight of a model, quantised or not, once."""
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    experts = [module for module in model.modules() if isinstance(module, QuantisedExperts)]
    for module in experts:
        yield Stored(module.values, sum(p.nbytes for p in module.parameters()), True)
    inside = {id(p) for module in experts for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            yield _stored(parameter, id(parameter) in ends)


def _stored(parameter: nn.Parameter, ends: bool) -> Stored:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes' Params4bit
    if state is not None:
        scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
        return Stored(state.shape.numel(), parameter.nbytes + sum(scale.nbytes for scale in scales), True, ends)
    if parameter.is_floating_point():
        return Stored(parameter.numel(), parameter.nbytes, False, ends)
    return Stored(parameter.numel(), parameter.nbytes + 4 * parameter.shape[0], True, ends)  # int8, a float32 scale per row


def require_quantised(model: PreTrainedModel, path: str) -> str:
    """A line that says what of a quantised model is quantised; UserError if it is less than half outside the ends."""
    weights = list(stored_weights(model))
    inner = [weight for weight in weights if not weight.ends]
    share = sum(w.values for w in inner if w.quantised) / max(sum(w.values for w in inner), 1)
    if share < _MOSTLY:
        raise UserError(
            f"{path}: quantization left most weights unquantised (only {share:.0%} of the parameters outside the embeddings "
            f"are quantised): {type(model).__name__} keeps them where neither bitsandbytes nor daekit looks for them. "
            "Load this model without quantization."
        )
    values, size = (sum(getattr(w, name) for w in weights if w.quantised) for name in ("values", "bytes"))
    every, total = sum(w.values for w in weights), sum(w.bytes for w in weights)
    return (
        f"{path}: {values / every:.1%} of {every / 1e9:.3g} billion parameters are quantised, {size / values:.3f} bytes each; "
        f"the whole model takes {total / 2**20:,.0f} MiB"
    )


def require_whole_blocks(model: nn.Module, path: str) -> None:
    """UserError for 4-bit matrices on a CPU whose rows are no whole blocks: they come out wrong (measured: 0.50.2)."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.absmax.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise UserError(
                f"{path}: {name} has rows of {state.shape[-1]} values, which is not a multiple of {state.blocksize}: on a CPU "
                "bitsandbytes would dequantise them with the scales of other blocks. Load this model without quantization, or "
                "on a GPU."
            )


def pack_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the bytes of 4-bit weights pass for values of a floating dtype (``bnb_4bit_quant_storage``), without a copy.

    accelerate leaves bytes out of what FSDP2 splits, and FSDP2 casts floats of another dtype than its policy's.
    """
    module: Any
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and getattr(weight, "quant_state", None) is not None:
            weight.data = weight.data.flatten().view(dtype)[:, None]
            weight.quant_storage = module.quant_storage = dtype


def keep_four_bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU that knows AVX512-BF16.

    There the first forward in eval mode rounds the scales to bfloat16 in place and switches to a product without gradient, also
    for the student that shares the base with a teacher: after a teacher's forward the student would be another model, and
    the gradient would stop at its last 4-bit layer without an error.

    Raises:
        UserError: the weights have been repacked already, which cannot be undone exactly.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                f"{name}: a forward in eval mode has repacked its 4-bit weights for inference on this CPU, rounding their "
                "scales. Give the trainer the model as it was loaded."
            )
        module.support_avx512bf16_for_cpu = False
