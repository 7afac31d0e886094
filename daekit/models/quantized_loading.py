"""transformers' loader, with experts quantised as they come from disk and shards read without mapping them.

The loader takes one parameter at a time: it reads its parts (w1 and w3 of every expert), merges them and hands them to the
quantiser's operation. So the host holds what is quantised so far and about twice one parameter. Its own way of reading maps
the shards, whose pages then count as the process's memory; here they are read (``pread``) into memory that is freed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers.modeling_utils as library
import transformers.quantizers.auto as choice
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from daekit.environment import replaced
from daekit.errors import UserError
from daekit.models.experts import PROJECTIONS, is_experts_layer, quantise_experts


def reading_unmapped() -> AbstractContextManager[None]:
    """Inside, transformers reads safetensors files instead of mapping them."""
    safe_open = library.safe_open

    def open_unmapped(file: str, **options: Any) -> Any:
        return safe_open(file, **(options | {"backend": "pread"}))

    return replaced(library, "safe_open", open_unmapped)


def quantising_experts() -> AbstractContextManager[None]:
    """Inside, transformers chooses our quantisers for bitsandbytes, which know experts."""
    ours = {"bitsandbytes_4bit": _FourBits, "bitsandbytes_8bit": _EightBits}
    return replaced(choice, "AUTO_QUANTIZER_MAPPING", choice.AUTO_QUANTIZER_MAPPING | ours)


class _WithExperts:
    """What both quantisers add to transformers' own: experts are quantised like the Linear modules around them."""

    bits: int
    quantization_config: BitsAndBytesConfig

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        return super().param_needs_quantization(model, param_name, **options) or self.is_expert(model, param_name)  # type: ignore[misc]

    def is_expert(self, model: PreTrainedModel, param_name: str) -> bool:
        module, name = get_module_from_name(model, param_name)
        weight = getattr(module, name, None)
        kind = name in PROJECTIONS and isinstance(weight, nn.Parameter) and weight.ndim == 3
        return kind and is_experts_layer(module) and should_convert_module(param_name, self.modules_to_not_convert)  # type: ignore[attr-defined]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)  # type: ignore[misc]
        config = self.quantization_config
        plain = self.bits == 4 and not (config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant)
        if plain and any(self.is_expert(model, name) for name, _ in model.named_parameters()):
            raise UserError(
                f"quantization_config: experts are quantised as nf4 with double quantisation, not as "
                f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}, bnb_4bit_use_double_quant="
                f"{config.bnb_4bit_use_double_quant}; set them to 'nf4' and True"
            )

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self, super().get_quantize_ops())  # type: ignore[misc]


class _Quantise(ConversionOps):
    """The operation on one parameter from disk: ours for experts, that of transformers for all else."""

    def __init__(self, quantiser: _WithExperts, linear: ConversionOps) -> None:
        self.quantiser, self.linear = quantiser, linear

    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any = None, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        name, value = next(iter(input_dict.items()))
        if not self.quantiser.is_expert(model, name):
            return self.linear.convert(input_dict, model=model, missing_keys=missing_keys, **options)
        input_dict.clear()
        weight: Tensor = value[0] if isinstance(value, list) else value
        module, leaf = get_module_from_name(model, name)
        config = self.quantiser.quantization_config
        dtype: torch.dtype = config.bnb_4bit_compute_dtype if self.quantiser.bits == 4 else weight.dtype
        quantise_experts(module, leaf, weight, self.quantiser.bits, dtype)
        module._is_hf_initialized = True  # or the loader would give it random weights
        missing_keys.discard(name)
        return {f"{name}.{part}": parameter for part, parameter in getattr(module, leaf).named_parameters()}


class _FourBits(_WithExperts, Bnb4BitHfQuantizer):
    """bitsandbytes 4 bits, experts included."""

    bits = 4


class _EightBits(_WithExperts, Bnb8BitHfQuantizer):
    """bitsandbytes LLM.int8 for Linear modules, blockwise 8 bits for experts."""

    bits = 8
