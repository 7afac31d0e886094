"""Models without weights: under FSDP2 the first rank reads a teacher, the others get their parts from it, layer by layer.

A host that has eight ranks would otherwise hold the teacher eight times before it is split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from daekit.errors import UserError
from daekit.models.sharded import is_sharded
from daekit.recipe.schema import ModelSpec


def hollow_model(spec: ModelSpec) -> PreTrainedModel | None:
    """The model in a directory or hub id with its parameters on the meta device.

    None where every rank has to read it: one that is quantised or placed is not split. Also where its config cannot be read;
    what is wrong is said by the one who reads the weights.
    """
    if spec.quantization or spec.offload or spec.device_map is not None:
        return None
    try:
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return None
    if getattr(config, "quantization_config", None):  # transformers sets it on configs of quantised checkpoints only
        return None
    options: dict[str, Any] = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code, **options)
    model.tie_weights()
    return model


def is_hollow(model: nn.Module) -> bool:
    """Whether a model waits for its weights; one that a device map has placed knows where they are."""
    placed = getattr(model, "hf_device_map", None)
    return not placed and all(parameter.is_meta for parameter in model.parameters())


def deal(module: nn.Module, device: torch.device) -> None:
    """Give every rank the first one's parameters and buffers of a module, whole, on ``device``; those split already stay.

    A collective call.

    Raises:
        UserError: the first rank has read another model than this one was made for.
    """
    first = dist.get_rank() == 0
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not is_sharded(p)}
    mine = parameters | dict(module.named_buffers())
    sent: list[Any] = [{name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}]
    dist.broadcast_object_list(sent, src=0)
    here = {name: tensor.shape for name, tensor in mine.items()}
    if here != {name: shape for name, (shape, _) in sent[0].items()}:
        raise UserError(
            f"{type(module).__name__}: rank {dist.get_rank()} has built other parameters from its config than the first rank "
            "has read: are the files of the model the same on all machines?"
        )
    fresh: dict[int, Tensor] = {}  # by identity, so that tied parameters stay one
    for name, (shape, dtype) in sent[0].items():
        value = mine[name].detach().to(device).contiguous() if first else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, src=0)
        fresh[id(mine[name])] = nn.Parameter(value, requires_grad=False) if name in parameters else value
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            table.update({name: fresh[id(tensor)] for name, tensor in table.items() if id(tensor) in fresh})
