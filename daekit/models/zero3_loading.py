"""Models that ZeRO-3 has split before they are read: each rank reads its own part of every tensor from the disk.

transformers makes such a model under ``zero.Init``, which splits each parameter as it is made. It would then read the whole
checkpoint on the first rank, which gathers each parameter and tells the others. Here its loader runs on every rank and reads
what lies there: of a parameter whose rows can be dealt out evenly, which is almost every one, the rows of this rank; of another
one the whole, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers.modeling_utils as library
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from transformers import PreTrainedModel
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

from daekit.environment import replaced
from daekit.models.split_loading import can_read_parts, exchange, mixes_rows, read_tensors, replacing_weights


@contextmanager
def each_rank_reading() -> Iterator[None]:
    """Inside, each rank reads its part of what ``from_pretrained`` loads under ZeRO-3; nothing changes elsewhere."""
    if is_deepspeed_zero3_enabled() and can_read_parts():
        with replacing_weights(_read):
            yield
    else:
        yield


def in_own_dtype() -> AbstractContextManager[None]:
    """Inside, ZeRO-3 makes models in the dtype that they are loaded in; for those that are not trained.

    Where no mixed precision is asked for, ``zero.Init`` would make them in float32, twice the size of one in 16 bits.
    """
    original = library.deepspeed_config

    def plain(dtype: torch.dtype) -> dict[str, Any] | None:
        config = original()
        if config is None or any((config.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")):
            return config
        return config | {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}

    context = PreTrainedModel.get_init_context.__func__  # type: ignore[attr-defined]

    def get_init_context(cls: type, dtype: torch.dtype, *more: Any) -> Any:
        with replaced(library, "deepspeed_config", lambda: plain(dtype)):
            return context(cls, dtype, *more)

    return replaced(PreTrainedModel, "get_init_context", classmethod(get_init_context))


@contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, models are loaded as without ZeRO-3: whole on each rank, or where a device map says."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    kept = reference and reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            deepspeed.set_hf_deepspeed_config(kept)


def _read(original: Callable[..., Any], model: PreTrainedModel, _: Any, files: Any, config: Any, *more: Any) -> Any:
    """Fill this rank's part of each parameter, and leave to transformers what the checkpoint lacks."""
    targets = dict(model.named_parameters())
    if not all(map(_is_plain_part, targets.values())):
        return original(model, None, files, config, *more)
    by_rows = not mixes_rows(config)
    ranks = dist.GroupMember.WORLD
    assert ranks is not None, "zero.Init has connected them"
    mesh = DeviceMesh.from_group(ranks, "cpu")  # nothing is sent over it

    def keep(name: str, values: Tensor) -> None:
        _fill(targets[name], values)
        targets[name]._is_hf_initialized = True  # type: ignore[attr-defined]

    with replaced(library, "is_deepspeed_zero3_enabled", lambda: False):  # its loader does not know of ZeRO-3
        result = read_tensors(lambda _, p: _stand_in(p, mesh, by_rows), keep, original, model, None, files, config, *more)
    exchange(model, {id(stand_in): targets[name] for name, stand_in in model.named_parameters()})
    return result


def _is_plain_part(parameter: Tensor) -> bool:
    """Whether this rank's part lies in memory as one of as many as there are ranks: not whole, on NVMe, or quantised."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None or part.final_location is not None or hasattr(part, "ds_quant_scale"):
        return False
    return parameter.ds_secondary_tensor is None and part.numel() * dist.get_world_size() == parameter.ds_numel_aligned  # type: ignore[attr-defined]


def _stand_in(parameter: Any, mesh: DeviceMesh, by_rows: bool) -> nn.Parameter:
    """A parameter without memory: this rank's rows where ZeRO-3's part, which is one of the flat values, is made of rows."""
    shape, options = parameter.ds_shape, {"dtype": parameter.dtype, "device": "meta"}
    if not (by_rows and shape and shape[0] % mesh.size() == 0):
        return nn.Parameter(torch.empty(shape, **options), parameter.requires_grad)
    rows = torch.empty((shape[0] // mesh.size(), *shape[1:]), **options)
    return nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)], run_check=False), parameter.requires_grad)


def _fill(parameter: Any, values: Tensor) -> None:
    """Copy this rank's part of ``values``, which are all of the parameter's or the rows of this rank."""
    part, flat = parameter.ds_tensor, values.reshape(-1)
    if flat.numel() == parameter.ds_numel:
        flat = flat[part.numel() * parameter.ds_zero_partition_rank :][: part.numel()]  # the last part may be shorter
    part[: flat.numel()].copy_(flat)
