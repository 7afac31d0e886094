"""Layers that allocate and keep what bitsandbytes' and daekit's quantised layers do, without weights and kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_EXPERTS = "daekit_planned"
_BLOCK = 64  # values of a 4-bit weight that share a scale; 256 of these one-byte scales share one of their own
_CODES = (16 + 256) * 4 + 4  # code books and offset of a 4-bit Linear
_BLOCK_8 = 256  # values of an expert in 8 bits that share a scale


def quantize_layers(model: nn.Module, bits: int, dtype: torch.dtype) -> dict[int, int]:
    """Quantise all Linear modules of a meta model but its output head, and all its MoE experts.

    Args:
        model: A model on the meta device.
        bits: 4 or 8.
        dtype: The dtype of the matrix products.

    Returns:
        Bytes of each quantised parameter, by its ``id``.
    """
    sizes = {}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not head:
            module.__class__ = _FourBit if bits == 4 else _EightBit
            module.compute_dtype = dtype  # type: ignore[assignment]
            sizes[id(module.weight)] = _linear_bytes(module.weight, bits)
        elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            for name, weight in [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim == 3]:
                delattr(module, name)
                module.add_module(name, _Experts(weight))
                sizes[id(weight)] = _experts_bytes(weight.numel(), bits)
            module.config._experts_implementation = _EXPERTS  # type: ignore[union-attr]
            vars(module)["compute_dtype"] = dtype
    model.requires_grad_(False)
    return sizes


def _linear_bytes(weight: Tensor, bits: int) -> int:
    values = weight.numel()
    if bits == 8:
        return values + 4 * weight.shape[0]
    return values // 2 + values // _BLOCK + 4 * -(-values // (_BLOCK * 256)) + _CODES


def _experts_bytes(values: int, bits: int) -> int:
    return values + 4 * values // _BLOCK_8 if bits == 8 else values // 2 + values // _BLOCK + 4 * values // (_BLOCK * 256)


class _FourBit(nn.Linear):
    """Like bitsandbytes' Linear4bit: each pass dequantises the weights, and no pass keeps its input."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input.to(self.compute_dtype), self.out_features)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(input.dtype)


class _EightBit(_FourBit):
    """Like LLM.int8: the input is quantised, and kept as it was for the backward pass, also under checkpointing."""

    def forward(self, input: Tensor) -> Tensor:
        return _Int8Product.apply(input, self.out_features)


class _Experts(nn.Module):
    """One projection of all MoE experts of a layer, in a module of its own, so that PEFT finds no parameter in the layer."""

    def __init__(self, weight_EOI: nn.Parameter) -> None:
        super().__init__()
        self.codes = weight_EOI


class _Product(torch.autograd.Function):
    """``x W^T`` where each pass allocates W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.shape = outputs, x.shape[-1]
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.shape), None


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.shape, ctx.input = (outputs, x.shape[-1]), x
        half = x.to(torch.float16)
        codes = torch.empty_like(half, dtype=torch.int8)
        del half
        sums = codes.new_empty((*x.shape[:-1], outputs), dtype=torch.int32)
        return sums.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.input.dtype) @ ctx.input.new_empty(ctx.shape), None


def _experts_forward(self: nn.Module, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """``daekit.models.experts.experts_forward``, with the tokens spread evenly over the MoE experts."""
    module: Any = self
    tokens, top_k = expert_NK.shape
    order_S = expert_NK.flatten().argsort(stable=True)
    outputs = []
    for slots in order_S.chunk(module.num_experts):
        inner = _expert(module, "gate_up_proj" if module.has_gate else "up_proj", hidden_NH[slots // top_k])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outputs.append(_expert(module, "down_proj", inner) * weight_NK.flatten()[slots, None])
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return torch.cat(outputs)[place_S].view(tokens, top_k, -1).sum(1).to(hidden_NH.dtype)


def _expert(module: Any, name: str, x_SI: Tensor) -> Tensor:
    device = x_SI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else module.compute_dtype
    outputs = getattr(module, name).codes.shape[2 if module.is_transposed else 1]
    return _Product.apply(x_SI.to(dtype), int(outputs))


ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_forward)


class FusedDropout(nn.Dropout):
    """Dropout as a GPU runs it: the mask has one byte per value (on a CPU the mask has the dtype of the values)."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]
