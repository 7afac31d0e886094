"""Weights of a checkpoint back into a live model: every key, or an error."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from daekit.errors import UserError
from daekit.models.backbone import base_of
from daekit.models.sharded import assign, is_sharded, shape_of, whole
from daekit.models.split_loading import CannotWaitError, can_read_parts, give_back_pieces, read_into
from daekit.models.zero3_loading import each_rank_reading

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# no pickles; what is missing or of another shape is named, where transformers would fill in random weights
ALWAYS = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def restore_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights saved in ``folder`` into ``model`` in place; dtypes stay those of the model.

    The Trainer's own way (``load_state_dict(strict=False)``) leaves the experts of a Mixtral as they are, because they are
    saved under other names than they live under; ``from_pretrained`` knows the conversion. Under FSDP2 each rank reads its
    part; elsewhere this needs host memory for a second copy of the student while it loads.

    Raises:
        UserError: the weights are missing or unreadable; one of them is missing, left over or of another shape.
    """
    if isinstance(model, PeftModel):
        restore_adapter(model, folder, model.active_adapter)
        return
    base = base_of(model)
    give_back_pieces(model)

    load = partial(type(base).from_pretrained, folder, config=base.config, dtype="auto", **ALWAYS)
    in_parts = can_read_parts() and any(isinstance(parameter, DTensor) for parameter in base.parameters())
    try:
        with each_rank_reading():
            try:
                loaded, info = read_into(base, load) if in_parts else load()
            except CannotWaitError:
                in_parts = False
                loaded, info = load()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be read ({error})") from error
    if wrong := {what: sorted(map(str, keys)) for what, keys in info.items() if keys and what.endswith("_keys")}:
        raise UserError(f"{folder}: its weights do not fit the student: {wrong}")
    if in_parts:
        return
    if any(map(is_sharded, base.parameters())):
        _assign_all(base, loaded)
    else:
        base.load_state_dict(loaded.state_dict(), strict=True)


def _assign_all(model: nn.Module, loaded: nn.Module) -> None:
    """Copy a whole model into a sharded one (whose projections are not part of it); under ZeRO-3 both are sharded.

    Buffers that no file holds (rotary frequencies) stay as they are: a run may have changed them.
    """
    parameters, buffers, saved = dict(model.named_parameters()), dict(model.named_buffers()), loaded.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        assign(parameters[name], whole(parameter))
    for name, buffer in loaded.named_buffers():
        if name in saved:
            buffers[name].copy_(buffer)


def restore_adapter(model: PeftModel, folder: Path, name: str, saved_dtypes: bool = False) -> None:
    """Load the adapter saved in ``folder`` into the one called ``name``: every tensor, or a UserError.

    With ``saved_dtypes`` each parameter takes the dtype that its tensor has there: PEFT makes float32 of all.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the weights of the LoRA adapter cannot be read ({error})") from error
    expected = _parameters_as_saved(model, name)
    if different := sorted(_shapes(saved) ^ _shapes(expected)):
        raise UserError(f"{path}: its weights do not fit the model's adapter: {len(different)} differ, such as {different[0]}")
    if saved_dtypes:
        for key, parameter in expected.items():
            dtype = saved[key].dtype
            if dtype not in _DTYPES:
                raise UserError(f"{folder}: the adapter's weights are in {dtype}; known: {', '.join(map(str, _DTYPES))}")
            parameter.data = parameter.data.to(dtype)
    if any(map(is_sharded, expected.values())):
        for key, parameter in expected.items():
            assign(parameter, saved[key])
    else:
        set_peft_model_state_dict(model, saved, adapter_name=name)


def _parameters_as_saved(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The parameters of an adapter under the names that PEFT saves them by; it is asked for the names of numbers."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    saved = get_peft_model_state_dict(model, state_dict=numbers, adapter_name=adapter)
    return {name: parameters[int(number)] for name, number in saved.items()}


def _shapes(weights: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(shape_of(tensor))) for name, tensor in weights.items()}
