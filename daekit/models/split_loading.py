"""Models that FSDP2 splits before they are read: each rank then reads its own part of every tensor from the disk.

``waiting_model`` makes the model with memory that nobody has touched (the system gives it no page), so that adapters, hooks
and FSDP2 can be put on it as on any other; ``read_parts`` fills what FSDP2 has left of it on this rank. transformers' loader
does the reading, renaming and fusing; it knows how to read a part of a tensor where the parameter is a DTensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import transformers.core_model_loading as conversion
import transformers.modeling_utils as library
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from daekit.environment import replaced, variable
from daekit.models.backbone import base_of
from daekit.models.placement import free_memory
from daekit.models.quantized_loading import reading_unmapped

_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers reads ahead as fast as it can, which would be a second copy


class CannotWaitError(Exception):
    """Why a model has to be read whole."""


def can_read_parts() -> bool:
    """Whether this version of transformers reads parts of tensors."""
    return importlib.util.find_spec("transformers.distributed.sharding_utils") is not None


def waits(model: nn.Module) -> bool:
    """Whether a model, or the base of a PEFT model, has not been read yet: its values mean nothing."""
    return hasattr(base_of(model), "daekit_unread")


def waiting_model(load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model of ``load``, with parameters of the right shapes and dtypes that have not been read.

    Args:
        load: calls ``from_pretrained``; it is called again when the model is read.

    Raises:
        CannotWaitError: something of the model cannot be read in parts.
    """
    if not can_read_parts():
        raise CannotWaitError("this transformers reads no parts of tensors")
    with replacing_weights(_allocate):
        model = load()
    model.daekit_unread = load  # until it is read
    return model


def another(model: PreTrainedModel) -> PreTrainedModel:
    """The same model once more, waiting like the first."""
    return waiting_model(model.daekit_unread)


def read_parts(model: nn.Module) -> None:
    """Read this rank's parts of a waiting model that FSDP2 has split. Every rank does it, without waiting for the others."""
    base = base_of(model)
    load = base.daekit_unread
    del base.daekit_unread
    read_into(base, load)
    free_memory()


def read_into(base: PreTrainedModel, load: Callable[[], Any]) -> Any:
    """Read this rank's parts of what ``load`` loads into a model that FSDP2 has split; returns what ``load`` does, emptied.

    Other tensors of ``base`` (adapters, projections) stay as they are.

    Raises:
        CannotWaitError: the checkpoint has to be read whole.
    """
    # tied ones under both names, for the loader ties them last; PEFT puts a layer of its own around one that it adapts
    named = base.named_parameters(remove_duplicate=False)
    targets = {".".join(part for part in name.split(".") if part != "base_layer"): p for name, p in named}

    def split(name: str, parameter: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(targets[name], dtype=parameter.dtype, device="meta"))

    def keep(name: str, part: Tensor) -> None:
        if name in targets:
            targets[name]._local_tensor.copy_(part)  # type: ignore[attr-defined]

    def read(original: Callable[..., Any], model: PreTrainedModel, state: Any, files: Any, config: Any, *more: Any) -> Any:
        _refuse_mixed_rows(config)
        return read_tensors(split, keep, original, model, state, files, config, *more)

    with replacing_weights(read):
        return load()


def give_back_pieces(model: nn.Module) -> None:
    """Split again what FSDP2 leaves whole after a forward that no backward follows; what is copied there would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- in transformers' loader --------------------------------------------------------------------------------------------


def replacing_weights(load_weights: Callable[..., Any]) -> AbstractContextManager[None]:
    """Inside, ``from_pretrained`` calls ``load_weights(original, model, state_dict, files, config)`` to read the files."""
    original = library.PreTrainedModel._load_pretrained_model

    def load(*given: Any) -> Any:
        return load_weights(original, *given)

    return replaced(library.PreTrainedModel, "_load_pretrained_model", staticmethod(load))


def _allocate(original: Callable[..., Any], model: PreTrainedModel, _: Any, files: list[str], config: Any) -> Any:
    """Let the loader convert tensors without values, which tells names, shapes and dtypes; then take memory for them."""
    headers: dict[str, Tensor] = {}
    for file in files:
        headers |= library.load_state_dict(file, map_location="meta")
    result = original(model, headers, None, replace(config, device_map={"": "meta"}))
    _refuse_mixed_rows(config)
    missing = result[0].missing_keys
    stored = {name for name, _ in model.named_buffers()} - {name for name, _ in model.named_non_persistent_buffers()}
    if stored:
        raise CannotWaitError(f"its checkpoint holds buffers, such as {sorted(stored)[0]}")
    for one, other in model.all_tied_weights_keys.items():
        if one not in missing and other not in missing:
            raise CannotWaitError(f"{one} and {other} are one tensor, and its checkpoint holds both")
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    fresh: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and parameter.shape[0] < world:
            raise CannotWaitError(f"{name} has fewer experts than there are ranks")
        if name not in missing:
            fresh[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            fresh[id(parameter)]._is_hf_initialized = True  # type: ignore[attr-defined]
    exchange(model, fresh)
    return result


def mixes_rows(config: Any) -> bool:
    """Whether a rank's rows of a parameter may come of others of the checkpoint, which transformers' loader does not see."""
    converters = [each for each in config.weight_mapping or [] if isinstance(each, conversion.WeightConverter)]
    steps = [step for converter in converters for step in converter.operations]
    return not all(isinstance(step, conversion.MergeModulelist) or getattr(step, "dim", 0) > 0 for step in steps)


def _refuse_mixed_rows(config: Any) -> None:
    if mixes_rows(config):
        raise CannotWaitError("its checkpoint is converted in a way that mixes rows of tensors")


def read_tensors(
    empty: Callable[[str, nn.Parameter], nn.Parameter],
    keep: Callable[[str, Tensor], None],
    original: Callable[..., Any],
    model: PreTrainedModel,
    *given: Any,
) -> Any:
    """Let transformers' loader read a model parameter by parameter, without ever holding it.

    Args:
        empty: the parameter without memory that the loader shall see in place of one; a DTensor where a part is to be read.
        keep: takes the values that were read for the parameter of a name, which are gone afterwards.
        original: what ``replacing_weights`` replaces, with ``model`` and what else it was given.
    """
    exchange(model, {id(p): empty(name, p) for name, p in model.named_parameters()})
    put = conversion.set_param_for_module

    def put_and_keep(owner: nn.Module, name: str, value: Tensor, *more: Any) -> None:
        put(owner, name, value, *more)  # compares shapes
        module, _, leaf = name.rpartition(".")
        read = owner.get_submodule(module)._parameters.get(leaf)  # buffers stay there
        values = read._local_tensor if isinstance(read, DTensor) else read
        if read is not None and values is not None and not values.is_meta:
            with torch.no_grad():
                keep(name, values)
            gone = nn.Parameter(torch.empty_like(read, device="meta"))
            gone._is_hf_initialized = True  # type: ignore[attr-defined]
            owner.get_submodule(module)._parameters[leaf] = gone

    with replaced(conversion, "set_param_for_module", put_and_keep), reading_unmapped(), variable(_SYNCHRONOUS, "1"):
        return original(model, *given)


def exchange(model: nn.Module, fresh: Mapping[int, nn.Parameter]) -> None:
    """Put new parameters in the places of old ones, whose identities are the keys; shared ones stay shared."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if id(old) in fresh:
                module._parameters[name] = fresh[id(old)]
