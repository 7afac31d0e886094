"""Quantised weights: bitsandbytes settings, what share is really quantised, and weights that stay as they were loaded."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from daekit.errors import UserError
from daekit.recipe.schema import ModelSpec


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


def quantised_share(model: PreTrainedModel) -> float:
    """Bytes of integer (quantised) parameters over the bytes of all weights but embeddings and the output head."""
    outside = {  # the ends of the model stay as they are under every quantisation
        id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    sizes = [(p.numel() * p.element_size(), p.is_floating_point()) for p in model.parameters() if id(p) not in outside]
    return sum(size for size, floating in sizes if not floating) / max(sum(size for size, _ in sizes), 1)


def require_quantised(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Refuse a quantised model most of whose weights are not.

    Raises:
        UserError: less than half of the bytes outside embeddings and output head are quantised.
    """
    share = quantised_share(model)
    if share < 0.5:
        raise UserError(
            f"{spec.path}: quantization={spec.quantization} left most weights unquantised (only {share:.0%} of the bytes "
            "outside the embeddings are quantised): transformers keeps mixture-of-experts weights in 16 bits. "
            "Load this model without quantization."
        )


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
