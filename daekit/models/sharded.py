"""Whole weights of output heads that FSDP2 or ZeRO-3 has sharded: gathered once for a call of the loss, never per chunk.

A head's module is never called (the loss multiplies by its weight in chunks), so the hooks that gather it do not run. Inside
the forward of an FSDP2 root that owns the head, the weight is whole already and nothing happens here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from daekit.protocol import OutputHead


@contextmanager
def whole_heads(heads: Sequence[OutputHead]) -> Iterator[list[OutputHead]]:
    """The heads with whole weights. A collective where they are sharded: every rank must come here with the same heads.

    A parameter that several heads share is gathered once. Gradients flow to the sharded parameters as the mean over the
    ranks, which is what FSDP and ZeRO make of all others.
    """
    parameters = {id(p): p for head in heads for p in (head.weight, head.bias) if p is not None}
    with _zero3(list(parameters.values())):
        whole = {key: _Whole.apply(p) if isinstance(p, DTensor) else p for key, p in parameters.items()}
        yield [
            replace(head, weight=whole[id(head.weight)], bias=None if head.bias is None else whole[id(head.bias)])
            for head in heads
        ]


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a whole parameter; one that ZeRO-3 has sharded looks empty."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # type: ignore[attr-defined, return-value]


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter on the CPU, gathered if it is sharded. A collective call then: every rank must make it."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().cpu().clone()
    with _zero3([parameter]):
        return parameter.detach().cpu().clone()


class _Whole(torch.autograd.Function):
    """``full_tensor`` whose gradient is averaged over the ranks of the mesh, each of which has other tokens."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        # gloo has no mean: a sum of shares
        share = gradient / ctx.mesh.size()
        parts = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements)


def _zero3(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Gathers the parameters that ZeRO-3 has sharded and that are not gathered at the moment."""
    sharded = [p for p in parameters if hasattr(p, "ds_status")]
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # tied embeddings keep the weight gathered while they are in use, and to shard it on leaving would break them
    return deepspeed.zero.GatheredParameters([p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE])
