"""What would fit: the largest micro-batch, and the cheapest change of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from daekit.errors import UserError
from daekit.planning.training import Training
from daekit.recipe.schema import ModelSpec, StageSpec
from daekit.recipe.validation import dotted

_MOST_ROWS = 4096
_OTHER_WEIGHTS = ("LoRA", "QLoRA")
_BATCHES = "smaller micro-batches, more of them"


@dataclass(frozen=True)
class Change:
    """One way to need less memory: what it is in words, and the overrides that make it."""

    what: str
    overrides: tuple[str, ...]


def largest_rows(total: Callable[[int], int], memory: int, near: int = 2) -> int:
    """The largest number of rows whose ``total`` bytes fit, 0 if one row does not fit; ``total`` must grow with the rows.

    Args:
        total: Bytes of so many rows; about piecewise linear, so that a few guesses along its chords are enough.
        memory: Bytes that there are.
        near: Rows whose total is known already.
    """
    total = cache(total)
    if total(1) > memory:
        return 0
    low, high, guess, other = 1, _MOST_ROWS + 1, min(max(near, 2), _MOST_ROWS), 1
    while high - low > 1:
        slope = max((total(guess) - total(other)) // (guess - other), 1)
        low, high = (guess, high) if total(guess) <= memory else (low, guess)
        guess = min(max(low + (memory - total(low)) // slope, low + 1), high - 1)
        other = low
    return low


def changes(stage: StageSpec, name: str, training: Training, gpu: bool) -> list[Change]:
    """Changes that may make a stage fit, the cheapest first."""
    prefix = f"stages.{name}"
    batch, steps = f"{prefix}.trainer.per_device_train_batch_size", f"{prefix}.trainer.gradient_accumulation_steps"
    divisors = [rows for rows in range(training.rows // 2, 0, -1) if training.rows % rows == 0]
    together = training.accumulation * training.rows
    found = [Change(_BATCHES, (f"{batch}={rows}", f"{steps}={together // rows}")) for rows in divisors]
    if not training.checkpointing:
        found.append(Change("gradient checkpointing", (f"{prefix}.trainer.gradient_checkpointing=true",)))
    teachers = [(path, model) for path, model in _teacher_models(stage) if model.adapter is None]
    whole = [path for path, model in teachers if model.quantization is None and model.config is None]
    if whole:
        found.append(Change("teachers in 4 bits", tuple(f"{prefix}.{path}.quantization=4bit" for path in whole)))
    if "adam" in training.optim and "8bit" not in training.optim and gpu:
        found.append(Change("an optimizer with 8-bit states", (f"{prefix}.trainer.optim=adamw_8bit",)))
    near = [path for path, model in teachers if not model.offload and model.device_map is None]
    if near and gpu:
        found.append(Change("teachers in host memory", tuple(f"{prefix}.{path}.offload=true" for path in near)))
    lora = () if stage.lora is not None else (f"{prefix}.lora.r=16",)
    if lora:
        found.append(Change("LoRA", lora))
    student = stage.student
    if student is not None and student.quantization is None and student.config is None and gpu:
        found.append(Change("QLoRA", (*lora, f"{prefix}.student.quantization=4bit")))
    return found


def cheapest(options: Sequence[Change], fits: Callable[[Sequence[str]], bool]) -> tuple[Change, ...]:
    """The first single change that makes the stage fit, else a smallest set of changes; empty if all together do not suffice.

    Changes that train other weights (LoRA, QLoRA) are tried only after all others failed, alone and together.

    Args:
        options: The changes, the cheapest first.
        fits: Whether the stage fits with these overrides.
    """
    others = [option for option in options if option.what not in _OTHER_WEIGHTS]
    return _fewest(others, fits) or _fewest(options, fits)


def _fewest(options: Sequence[Change], fits: Callable[[Sequence[str]], bool]) -> tuple[Change, ...]:
    for option in options:
        if _fits(fits, [option]):
            return (option,)
    batches = [option for option in options if option.what == _BATCHES]
    others = [option for option in options if option.what != _BATCHES]
    if any(option.what == "QLoRA" for option in others):
        others = [option for option in others if option.what != "LoRA"]
    taken = [*batches[-1:], *others]
    if not _fits(fits, taken):
        return ()
    for option in reversed(taken):  # the most expensive is left out first
        fewer = [other for other in taken if other is not option]
        if _fits(fits, fewer):
            taken = fewer
    rest = [option for option in taken if option.what != _BATCHES]
    larger = [batch for batch in batches if len(taken) > len(rest) and _fits(fits, [batch, *rest])]
    return (*larger[:1], *rest)


def _fits(fits: Callable[[Sequence[str]], bool], options: Sequence[Change]) -> bool:
    try:
        return fits([override for option in options for override in option.overrides])
    except UserError:  # a change that this recipe does not allow
        return False


def _teacher_models(stage: StageSpec) -> list[tuple[str, ModelSpec]]:
    """(its key below the stage, the model) of every teacher that is loaded, and of every member of an ensemble."""
    loaded = {key: teacher for key, teacher in stage.teachers_by_key().items() if teacher.cache is None}
    return [(dotted((*key, *below)), model) for key, teacher in loaded.items() for below, model in teacher.models().items()]
