"""The options of a stage that decide its memory: the batch, and the states of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from daekit.errors import UserError
from daekit.planning.machine import Machine
from daekit.planning.meta_model import Parameter
from daekit.recipe.schema import StageSpec

# The defaults of trl.SFTConfig and of daekit's configs (a test compares them); no config is made here, because making one
# looks for a device.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "bf16": None,
    "optim": "adamw_torch_fused",
    "max_length": 1024,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
}
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_apex_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
_STATES_32 = {"adamw_bnb": 2, "adamw_32bit": 2, "lion": 1, "lion_32bit": 1, "rmsprop_bnb": 1, "rmsprop_32bit": 1, "ademamix": 3}
_STATES_8 = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "lion_8bit": 1, "rmsprop_8bit": 1, "rmsprop_bnb_8bit": 1, "ademamix_8bit": 3}
_SMALLEST_8 = 4096  # values; bitsandbytes keeps the states of smaller parameters in 32 bits
_BLOCK_8 = 256  # values of a state that share a scale


@dataclass(frozen=True)
class Training:
    """The options of a stage that decide its memory.

    Attributes:
        rows: Rows of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        checkpointing: Whether layers are run again in the backward pass instead of keeping their activations.
        autocast: The dtype of mixed precision; None without.
        optim: The optimizer's name, as transformers spells it.
        length: Tokens of the longest row.
        teacher_length: The same of what teachers see of rows with a ``teacher_prompt``.
        flat: Whether rows are laid end to end, without padding.
        flash: Whether the student's attention is FlashAttention, which takes no mask.
        uncounted: Options that change the memory, and that the plan does not count.
    """

    rows: int
    accumulation: int
    checkpointing: bool
    autocast: torch.dtype | None
    optim: str
    length: int
    teacher_length: int
    flat: bool
    flash: bool
    uncounted: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def attention_mask(self) -> bool:
        """Whether attention is given a mask of its own."""
        return not self.flash and (self.rows > 1 or self.flat)


def training_of(stage: StageSpec, name: str, machine: Machine) -> Training:
    """The options of a stage, with the trainers' defaults.

    Raises:
        UserError: ``max_length`` is null, so that nothing bounds a row.
    """
    options = DEFAULTS | stage.trainer
    if options["max_length"] is None:
        raise UserError(f"stages.{name}.trainer.max_length is null: without a longest row memory cannot be planned; give one")
    bf16 = machine.gpu if options["bf16"] is None else options["bf16"]
    student = stage.student
    return Training(
        rows=options["per_device_train_batch_size"],
        accumulation=options["gradient_accumulation_steps"],
        checkpointing=options["gradient_checkpointing"],
        autocast=torch.bfloat16 if bf16 else None,
        optim=str(options["optim"]),
        length=options["max_length"],
        teacher_length=max(options["max_length"], (stage.type != "sft" and stage.teacher_max_length) or 0),
        flat=options["padding_free"] or (options["packing"] and options["packing_strategy"] != "wrapped"),
        flash=student is not None and "flash" in (student.attn_implementation or ""),
        uncounted=tuple(name for name in ("activation_offloading", "torch_compile") if options.get(name)),
    )


def optimizer_bytes(optim: str, parameters: Iterable[Parameter], gpu: bool) -> tuple[int, int]:
    """(bytes of the states, the most bytes that a step needs besides); paged states of a GPU lie in the host's memory.

    Raises:
        UserError: The optimizer is none of those whose states are known here.
    """
    trained = [p for p in parameters if p.trained]
    name = optim.removeprefix("paged_")
    if name == "adafactor":
        states = sum(4 * (p.rows + p.values // p.rows) if p.rows else 4 * p.values for p in trained)
        return states, max((4 * p.values for p in trained), default=0)
    if name in _STATES:
        states = _STATES[name] * sum(p.values * p.width for p in trained)
        return states, _step_bytes(name, trained, gpu)
    if name in _STATES_32:
        states = 4 * _STATES_32[name] * sum(p.values for p in trained)
    elif name in _STATES_8:
        states = _STATES_8[name] * sum(_state_8(p) for p in trained)
    else:
        known = sorted(["adafactor", *_STATES, *_STATES_32, *_STATES_8])
        raise UserError(f"optim={optim!r}: the memory of its states is not known; known are {', '.join(known)}")
    return (0 if gpu and optim != name else states), 0


def _state_8(parameter: Parameter) -> int:
    if parameter.embedding or parameter.values < _SMALLEST_8:
        return 4 * parameter.values
    return parameter.values + 4 * -(-parameter.values // _BLOCK_8)


def _step_bytes(name: str, trained: list[Parameter], gpu: bool) -> int:
    """Temporaries of a step: a GPU updates all parameters at once unless the update is fused, a CPU updates them one by one."""
    if name != "adamw_torch":
        return 0
    sizes = [p.values * p.width for p in trained]
    return sum(sizes) if gpu else 2 * max(sizes, default=0)
