"""Models on other devices than the student: a device map, what crosses over for the loss; and memory that is given back."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import base_of
from daekit.recipe.model import SPREADS


def device_map_of(given: str | Mapping[str, str]) -> str | dict[str, Any]:
    """What transformers takes for the ``device_map`` of a recipe: numbers name GPUs, a single device takes everything."""
    if isinstance(given, str) and given in SPREADS:
        return given
    devices = {"": given} if isinstance(given, str) else given
    return {module: int(device) if device.isdigit() else device for module, device in devices.items()}


def require_devices(given: str | Mapping[str, str], path: str) -> None:
    """Every device that is named must exist here, otherwise UserError; before anything is loaded."""
    named = device_map_of(given)
    for device in named.values() if isinstance(named, dict) else ():
        kind = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        there = torch.cuda.device_count() if kind.type == "cuda" else 0
        if kind.type == "cuda" and (kind.index or 0) >= there:
            raise UserError(f"{path}: device_map names {device}, but there are {there} GPUs here; name one that exists, or cpu")
        if kind.type not in ("cpu", "cuda") and kind.type != getattr(torch.accelerator.current_accelerator(), "type", None):
            raise UserError(
                f"{path}: device_map names {device}, but there are no {kind.type} devices here; name others, or cpu"
            )


def hold_ends(model: PreTrainedModel) -> None:
    """Make embeddings and output head of a model that accelerate has offloaded real, and keep them so.

    Accelerate leaves a tensor of the meta device where a weight was, and brings it back when its module is called. The loss
    never calls the output head, and a product with a meta tensor is garbage without an error (measured).
    """
    from accelerate.hooks import remove_hook_from_module

    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not any(parameter.is_meta for parameter in module.parameters()):
            continue
        hook: Any = vars(module).get("_hf_hook")
        hook = next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None), None)
        if hook is None:
            raise UserError(f"{type(module).__name__}: its weights are on the meta device, and nobody knows where they are")
        real = {name: hook.weights_map[name] for name, parameter in module.named_parameters() if parameter.is_meta}
        remove_hook_from_module(module)
        for name, value in real.items():
            weight = value.to(hook.execution_device)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))


def input_device(model: nn.Module, usual: torch.device) -> torch.device:
    """Where a model wants its token ids; ``usual`` where FSDP2 or ZeRO-3 brings its weights to where they are needed."""
    weight: Any = base_of(model).get_input_embeddings().weight
    return usual if isinstance(weight, DTensor) or hasattr(weight, "ds_status") else weight.device


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass or mapping that holds tensors at any depth (a Batch, an OutputHead, Features), on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def free_memory() -> None:
    """Give back what nobody refers to any more: a trainer and its model refer to each other in circles, and would stay."""
    clear_device_cache(garbage_collection=True)
    with contextlib.suppress(AttributeError, OSError):  # glibc keeps freed blocks of up to 32 MB, other libraries do not
        ctypes.CDLL(None).malloc_trim(0)
