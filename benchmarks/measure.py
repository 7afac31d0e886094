"""Seconds and extra memory of one piece of work, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# One forward and backward: the loss and its gradients. A yardstick (another piece of work, for comparison of cost only)
# returns None and no gradients.
Outcome = tuple[Tensor | None, Sequence[Tensor]]
Work = Callable[[], Outcome]


@dataclass(frozen=True)
class Measurement:
    """What one contestant took.

    Attributes:
        seconds: the fastest repeat. The others were disturbed, by more or less.
        seconds_median: over the repeats.
        peak_mb: highest memory during the work, above the level just before it, in 2^20 bytes; None where unknown.
        check: the loss, then the norm of each gradient; empty for a yardstick.
        product_ms: a matrix product of 1024^3 in float32 just before and just after: how fast the machine was.
    """

    seconds: float
    seconds_median: float
    peak_mb: float | None
    check: list[float]
    product_ms: list[float]


def measure(work: Work, device: torch.device, repeats: int) -> Measurement:
    """Memory and check value of one call, then the time of ``repeats`` calls.

    On the CPU the memory is that of the first call: the allocator keeps what a call has freed, so that later calls would
    seem to need less. On a GPU it is that of the second: torch counts what is in use, and the first compiles kernels.
    """
    warm_up_libraries(device)
    if device.type == "cuda":
        work()
    with PeakMemory(device) as memory:
        outcome = work()
    check = values(outcome)
    del outcome
    before = _product_ms(device)
    seconds = [_seconds(work, device) for _ in range(repeats)]
    products = [before, _product_ms(device)]
    return Measurement(min(seconds), statistics.median(seconds), memory.megabytes, check, products)


def _product_ms(device: torch.device) -> float:
    a = torch.randn(1024, 1024, device=device)

    def product() -> Outcome:
        a @ a
        return None, ()

    return min(_seconds(product, device) for _ in range(5)) * 1e3


def values(outcome: Outcome) -> list[float]:
    """The loss, then the norm of each gradient."""
    loss, gradients = outcome
    if loss is None:
        return []
    return [loss.item(), *(torch.linalg.vector_norm(gradient, dtype=torch.float64).item() for gradient in gradients)]


def warm_up_libraries(device: torch.device) -> None:
    """Load the code and workspaces of the matrix library and of autograd, and start their threads: not the work's memory."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
        (a @ a).float().log_softmax(-1).sum().backward()


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class PeakMemory:
    """Context manager: ``megabytes`` is the highest memory inside it, above the level at its beginning.

    CUDA: the allocator's own count. CPU: the kernel's high-water mark of resident memory, reset at the beginning; where the
    mark cannot be reset a thread reads the resident memory every two milliseconds, which may miss a short peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.megabytes: float | None = None
        self._cuda = device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._level = torch.cuda.memory_allocated()
            return self
        _return_free_memory()
        self._sampler = None if _reset_high_water_mark() else _Sampler()
        self._level = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status("VmHWM") if self._sampler is None else self._sampler.stop()
        self.megabytes = (peak - self._level) / 2**20


def settled_level(device: torch.device) -> int:
    """Memory in use now, in bytes, after what is free has been given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _return_free_memory()
    return _status("VmRSS")


def _return_free_memory() -> None:
    """What making the inputs has freed goes back to the system, or the work would take it without a trace."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class _Sampler:
    """Highest resident memory of this process, read every two milliseconds until ``stop``."""

    def __init__(self) -> None:
        self._peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as statm:
            while not self._over.wait(0.002):
                statm.seek(0)
                self._peak = max(self._peak, int(statm.read().split()[1]) * page)

    def stop(self) -> int:
        """The peak, in bytes."""
        self._over.set()
        self._thread.join()
        return max(self._peak, _status("VmRSS"))
