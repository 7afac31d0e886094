"""The device that a recipe is planned for: this one, or one that the command line describes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from daekit.environment import host_memory, rank, ranks_here
from daekit.errors import UserError

Engine = Literal["none", "ddp", "fsdp2", "zero2", "zero3"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST = 10**6  # bytes; a smaller number without a unit is one whose unit was forgotten
# A process that trains on a CPU is 0.70 to 0.80 GB larger than its tensors: 0.62 GB once torch, transformers, trl and datasets
# are imported, the rest is the allocator's. Measured on five runs of models between 2 and 135 million parameters.
_LIBRARIES = 750_000_000
_CUDA_CONTEXT = 10**9  # context, libraries, and what the allocator cannot use; an estimate


@dataclass(frozen=True)
class Machine:
    """Where a recipe is to run.

    Attributes:
        memory: Bytes of one device.
        gpu: Whether the device is a GPU.
        count: Number of devices; each has one process.
        engine: How the processes share the work.
    """

    memory: int
    gpu: bool = True
    count: int = 1
    engine: Engine = "none"

    @property
    def overhead(self) -> int:
        """Bytes of the process that hold no tensors."""
        return _CUDA_CONTEXT if self.gpu else _LIBRARIES

    def shards(self, what: Literal["weights", "gradients", "optimizer"]) -> int:
        """The number of parts that the engine splits this into, one per device; 1 where each device holds it whole."""
        splits = self.engine in ("fsdp2", "zero3") or (self.engine == "zero2" and what != "weights")
        return self.count if splits else 1


def bytes_of(text: str) -> int:
    """``80GB`` (10^9 bytes), ``24GiB`` (2^30 bytes) or a number of bytes.

    Raises:
        UserError: The text is no size, or the size is not positive and finite.
    """
    number = text.strip().rstrip("BGKMTbgikmt")
    unit = text.strip()[len(number) :].upper()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"{text}: give a size such as 80GB or 24GiB") from None
    if not unit and 0 < size < _LEAST:
        raise UserError(f"{text}: is a number of bytes; {number}GB?")
    if not 0 < size < math.inf:
        raise UserError(f"{text}: a device has more than no memory, and not without end; give a size such as 80GB or 24GiB")
    return int(size)


def this_machine(cpu: bool = False) -> Machine:
    """The device of this process, and the engine that `accelerate launch` or torchrun announced in the environment.

    Args:
        cpu: Whether the run stays on the CPU although there is a GPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if cpu or not torch.cuda.is_available():
        return Machine(host_memory() // ranks_here(), gpu=False, count=count, engine=_engine(count))
    # the run itself refuses more ranks than devices
    device = min(rank(local=True), torch.cuda.device_count() - 1)
    return Machine(torch.cuda.mem_get_info(device)[0], gpu=True, count=count, engine=_engine(count))


def machine_of(gpu: str | None, cpu: str | None, count: int, engine: Engine | None) -> Machine:
    """The machine that the command line describes; what it leaves out is taken from this machine.

    Raises:
        UserError: A size cannot be read, both a GPU and a CPU are given, or an engine is given for one device.
    """
    if gpu is not None and cpu is not None:
        raise UserError(f"--gpu {gpu} --cpu {cpu}: a recipe runs on one of them")
    if count < 1:
        raise UserError(f"--gpus {count}: at least 1 is needed")
    if engine is not None and count == 1:
        raise UserError(f"--engine {engine}: one device shares its work with nobody; say how many there are with --gpus")
    size = gpu or cpu
    one = this_machine() if size is None else Machine(bytes_of(size), gpu=cpu is None)
    return Machine(one.memory, one.gpu, count, engine or ("ddp" if count > 1 else "none"))


def _engine(count: int) -> Engine:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if count > 1 else "none"
