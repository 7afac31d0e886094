"""Experts in 4 or 8 bits: transformers keeps all experts of a layer in one 3-D parameter, which is no Linear to be replaced.

Each such parameter becomes a ``QuantisedExperts``, and the layer runs ``experts_forward``, registered beside transformers'
own implementations (eager, batched_mm, grouped_mm): one expert is dequantised at a time, used, and forgotten.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "daekit_quantised"
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_BLOCK = {4: 64, 8: 256}  # values that share a scale; 64 is that of bitsandbytes' Linear4bit
_SCALES_BLOCK = 256  # scales of 4-bit blocks that share a scale of their own (double quantisation)


class QuantisedExperts(nn.Module):
    """One projection of all experts of a layer, quantised expert by expert and frozen.

    4 bits: nf4 with double quantisation, 0.516 bytes per value. 8 bits: bitsandbytes' blockwise 8-bit, 1.016 bytes per value
    (not LLM.int8, whose outlier columns belong to one matrix).

    Args:
        weight_EOI: the weights of E experts, each ``[O, I]`` (or ``[I, O]``, where the layer keeps them transposed).
        bits: 4 or 8.
        compute_dtype: dtype of the matrix products, outside autocast.
    """

    codes: Tensor
    absmax: Tensor
    absmax_mean: Tensor  # of 4 bits, as the next one
    absmax_scale: Tensor

    def __init__(self, weight_EOI: Tensor, bits: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.shape, self.compute_dtype = bits, weight_EOI.shape[1:], compute_dtype
        packed = [_pack(weight_OI.contiguous(), bits) for weight_OI in weight_EOI]
        for name in packed[0]:
            self.register_parameter(name, nn.Parameter(torch.stack([part[name] for part in packed]), requires_grad=False))
        self.values = weight_EOI.numel()

    def weight(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The dequantised weights of one expert; nobody may keep them."""
        from bitsandbytes import functional as bnb

        code = _dynamic_code(self.codes.device)
        if self.bits == 8:
            return bnb.dequantize_blockwise(
                self.codes[expert], bnb.QuantState(self.absmax[expert], self.shape, code, _BLOCK[8], dtype=dtype)
            )
        scales = bnb.QuantState(self.absmax_scale[expert], code=code, blocksize=_SCALES_BLOCK, dtype=torch.float32)
        # flat, because the kernel for CPUs takes other scales where a row is not a whole number of blocks
        flat = torch.Size([self.shape.numel()])
        state = bnb.QuantState(self.absmax[expert], flat, None, _BLOCK[4], "nf4", dtype, self.absmax_mean[expert], scales)
        return bnb.dequantize_4bit(self.codes[expert], state).view(self.shape)

    def forward(self, x_NI: Tensor, expert: int, transposed: bool) -> Tensor:
        """``[N, O]`` outputs of one expert, in the compute dtype; the gradient flows to ``x_NI`` only."""
        device = x_NI.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.compute_dtype
        return _Product.apply(x_NI.to(dtype), self, expert, transposed)


class _Product(torch.autograd.Function):
    """``x W^T`` (``x W`` where transposed) that keeps neither: the backward pass dequantises W again."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, experts: QuantisedExperts, expert: int, transposed: bool) -> Tensor:
        ctx.experts, ctx.expert, ctx.transposed = experts, expert, transposed
        weight = experts.weight(expert, x_NI.dtype)
        return torch.mm(x_NI, weight if transposed else weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None, None]:
        weight = ctx.experts.weight(ctx.expert, grad_NO.dtype)
        return torch.mm(grad_NO, weight.T if ctx.transposed else weight), None, None, None


def experts_forward(self: nn.Module, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """What transformers' ``grouped_mm`` computes for a layer of experts, active expert by active expert.

    ``self`` is the layer, of a class with ``use_experts_implementation``, whose projections are ``QuantisedExperts``; each of
    the N tokens has K experts with their weights.
    """
    module: Any = self
    tokens, top_k = expert_NK.shape
    order_S = expert_NK.flatten().argsort(stable=True)
    counts = torch.bincount(expert_NK.flatten(), minlength=module.num_experts).tolist()
    outputs = []
    for expert, slots in enumerate(order_S.split(counts)):
        if len(slots):
            output = _run_expert(module, hidden_NH[slots // top_k], expert)
            outputs.append(output * weight_NK.flatten()[slots, None])
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return torch.cat(outputs)[place_S].view(tokens, top_k, -1).sum(1).to(hidden_NH.dtype)


def _run_expert(module: Any, hidden_SH: Tensor, expert: int) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, first, hidden_SH, expert)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _project(module, "down_proj", inner, expert)
    # older transformers know no norm here
    return module.post_expert_norm(output) if vars(module).get("has_post_expert_norm") else output


def _project(module: Any, name: str, x_SI: Tensor, expert: int) -> Tensor:
    projected = getattr(module, name)(x_SI, expert, module.is_transposed)
    return projected + getattr(module, f"{name}_bias")[expert] if module.has_bias else projected


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def is_experts_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of experts whose forward transformers looks up by name, and so can be ours."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def quantise_experts(module: nn.Module, name: str, weight_EOI: Tensor, bits: int, compute_dtype: torch.dtype) -> None:
    """Replace the parameter ``name`` of a layer of experts by its quantised form, made of ``weight_EOI``."""
    delattr(module, name)
    module.add_module(name, QuantisedExperts(weight_EOI, bits, compute_dtype))
    module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]


def _pack(weight_OI: Tensor, bits: int) -> dict[str, Tensor]:
    from bitsandbytes import functional as bnb

    if bits == 8:
        codes, state = bnb.quantize_blockwise(weight_OI, blocksize=_BLOCK[8])
        return {"codes": codes, "absmax": state.absmax}
    codes, state = bnb.quantize_4bit(weight_OI, blocksize=_BLOCK[4], compress_statistics=True, quant_type="nf4")
    return {"codes": codes, "absmax": state.absmax, "absmax_mean": state.offset, "absmax_scale": state.state2.absmax}


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit codes; its quantisation of blocks and of scales uses the same."""
    from bitsandbytes import functional as bnb

    return bnb.create_dynamic_map().to(device)
