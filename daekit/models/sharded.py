"""Parameters that FSDP2 or ZeRO-3 has sharded, whole again: read one by one, and output heads for a call of the loss.

A head's module is never called (the loss multiplies by its weight in chunks), so the hooks that gather it do not run; it is
gathered once for all chunks. Inside the forward of an FSDP2 root that owns the head, the weight is whole already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

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


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter whole and without gradient. A collective where it is sharded: every rank must come here."""
    with torch.no_grad(), _zero3([parameter]):
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter in host memory, gathered as by ``gathered``."""
    with gathered(parameter) as tensor:
        return tensor.cpu().clone()


def values_at(parameter: Tensor, index: Tensor) -> Tensor:
    """Float64 values at flat positions of a parameter; a collective where it is sharded. Parts of FSDP2's are not gathered."""
    if not (isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)):
        with gathered(parameter) as tensor:
            return tensor.flatten()[index.to(tensor.device)].double()
    mesh, local = parameter.device_mesh, parameter._local_tensor.detach().flatten()
    rows = -(-parameter.shape[0] // mesh.size())
    here = index.to(local.device) - mesh.get_local_rank() * rows * (parameter.numel() // parameter.shape[0])
    mine = (here >= 0) & (here < local.numel())
    bits = torch.zeros(len(index), dtype=torch.int64, device=local.device)  # a sum of floats would lose the sign of zero
    bits[mine] = local[here[mine]].double().view(torch.int64)
    dist.all_reduce(bits, group=mesh.get_group())
    return bits.view(torch.float64)


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 has taken the parameter apart."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_status")


def assign(parameter: Tensor, values: Tensor) -> None:
    """Copy whole values into a parameter, of which this rank may hold a part. A collective under ZeRO-3."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            values = values.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))  # each rank has them all
        else:
            with _zero3([parameter], modifier_rank=0):
                parameter.copy_(values)


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


def _zero3(parameters: Sequence[Tensor], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Gathers the parameters that ZeRO-3 has sharded and that are not gathered at the moment.

    With a ``modifier_rank`` what that rank has changed in them is what they hold afterwards.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_status")]
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # tied embeddings keep the weight gathered while they are in use, and to shard it on leaving would break them
    apart = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(apart, modifier_rank=modifier_rank)
