"""The plan of a run on the machine that it is about to start on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from daekit.errors import UserError
from daekit.planning.plan import Reload, plan_recipe
from daekit.planning.show import format_plan, gigabytes
from daekit.planning.training import Engine, Machine
from daekit.recipe.schema import Recipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# what a stage needs at the least is weights, gradients and optimizer; its measured error is below this (benchmarks/results)
_CERTAIN = 0.9


def bytes_of(text: str) -> int:
    """``80GB`` (10^9 bytes), ``24GiB`` (2^30 bytes) or a number of bytes.

    Raises:
        UserError: anything else.
    """
    number = text.strip().rstrip("BGKMTbgikmt")
    unit = text.strip()[len(number) :].upper()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"{text}: give a size such as 80GB or 24GiB") from None
    if size <= 0:
        raise UserError(f"{text}: a device has more than no memory")
    return int(size)


def this_machine(cpu: bool = False) -> Machine:
    """The device of this process and how it shares the work: what `accelerate launch` and torchrun wrote down.

    Args:
        cpu: whether the run stays on the CPU although there is a GPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if cpu or not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return Machine(_host_memory() // local, gpu=False, count=count, engine=_engine(count))
    # more ranks than devices are refused by the run itself
    device = min(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() - 1)
    return Machine(torch.cuda.mem_get_info(device)[0], gpu=True, count=count, engine=_engine(count))


def machine_of(gpu: str | None, cpu: str | None, count: int, engine: Engine | None) -> Machine:
    """The machine that the command line describes; what it does not say is this machine's.

    Raises:
        UserError: sizes that are none, a device that is both, an engine for one device.
    """
    if gpu is not None and cpu is not None:
        raise UserError(f"--gpu {gpu} --cpu {cpu}: a recipe runs on one of them")
    if count < 1:
        raise UserError(f"--gpus {count}: at least 1 is needed")
    if engine is not None and count == 1:
        raise UserError(f"--engine {engine}: one device shares its work with nobody; say how many there are with --gpus")
    size = gpu or cpu
    here = this_machine() if size is None else Machine(bytes_of(size), gpu=cpu is None)
    return Machine(here.memory, here.gpu, count, engine or ("ddp" if count > 1 else "none"))


def announce(recipe: Recipe, reload: Reload) -> None:
    """Say what the stages of a run that are not complete need, before anything is loaded.

    A model whose shape cannot be known stops nothing: then one line says so.

    Raises:
        UserError: weights, gradients and optimizer alone are larger than the machine's memory; with the plan.
    """
    todo = [name for name in recipe.stages if not (Path(recipe.output_dir) / "stages" / name / "stage.json").is_file()]
    for name in todo:
        _announce(recipe, name, this_machine(cpu=bool(recipe.stages[name].trainer.get("use_cpu", False))), reload)


def _announce(recipe: Recipe, name: str, machine: Machine, reload: Reload) -> None:
    try:
        plan = plan_recipe(recipe, machine, only=[name])
    except Exception as error:  # what the planner does not know of a model must stop no run
        _say(f"[{name}] no plan of its memory: {error}")
        return
    (stage,) = plan.stages
    peak, memory = stage.memory.total, machine.memory
    if stage.standing * _CERTAIN > memory:
        plan = plan_recipe(recipe, machine, reload, only=[name])
        raise UserError(
            f"stages.{name}: too large for this machine: its weights, gradients and optimizer alone take "
            f"{gigabytes(stage.standing)} of {gigabytes(memory)}. Nothing has been loaded.\n{format_plan(plan)}"
        )
    _say(f"[{name}] planned peak {gigabytes(peak)} of {gigabytes(memory)} (rows of {stage.training.length:,} tokens)")
    if peak > memory:
        _say(f"[{name}] warning: it may run out of memory where rows are that long; `daekit plan` says what would help")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _engine(count: int) -> Engine:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if count > 1 else "none"


def _host_memory() -> int:
    """Memory that this process can have: what is free, what others could swap out, and what its container allows."""
    available = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([available, *_container_limits()])


def _container_limits() -> Sequence[int]:
    """Bytes that the control group still allows, where it has a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        files = [line.split() for line in (root / "memory.stat").read_text().splitlines()]
    except OSError:
        return []
    if limit == "max":
        return []
    cache = sum(int(size) for name, size in files if name in ("inactive_file", "active_file"))
    return [int(limit) - used + cache]
