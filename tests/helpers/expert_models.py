"""Tiny mixture-of-experts models of several families, and their 4-bit weights unpacked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from daekit.models.experts import PROJECTIONS, QuantisedExperts, is_experts_layer

_SHAPE: dict[str, Any] = dict(
    vocab_size=48, hidden_size=64, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    initializer_range=0.1, num_experts_per_tok=2,
)  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(
        num_experts=4, intermediate_size=192, shared_expert_intermediate_size=64
    ),  # a shared expert of Linear modules
    "qwen3_moe": dict(num_experts=8),
    "gpt_oss": dict(num_local_experts=4),  # transposed weights, biases, another gate
}


def moe(kind: str, seed: int = 0) -> Any:
    """Its experts have weights of different sizes, as trained ones do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_SHAPE | KINDS[kind])))
    with torch.no_grad():
        for layer in layers_of_experts(model):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer, name)
                weight *= torch.linspace(0.5, 1.5, len(weight))[:, None, None]
    return model


def layers_of_experts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_experts_layer(module)]


def dequantised(model: Any, dtype: torch.dtype, implementation: str) -> Any:
    """The plain twin: the same model with the dequantised experts as parameters of transformers' own layer."""
    twin = copy.deepcopy(model)
    for layer in layers_of_experts(twin):
        layer.config._experts_implementation = implementation
        for name in PROJECTIONS:
            packed = getattr(layer, name, None)
            if isinstance(packed, QuantisedExperts):
                weight = torch.stack([packed.weight(expert, dtype) for expert in range(layer.num_experts)])
                delattr(layer, name)
                layer.register_parameter(name, nn.Parameter(weight))
    return twin


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
