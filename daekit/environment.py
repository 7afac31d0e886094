"""What the environment says of this process: its place among those of a launcher, its memory; what is set for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


def rank(local: bool = False) -> int:
    """The number of this process among those of a launcher (``local``: on this machine); 0 without one."""
    return int(os.environ.get("LOCAL_RANK" if local else "RANK", "0"))


def ranks_here() -> int:
    """How many processes a launcher has started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory() -> int:
    """Bytes that this process can have: what is free, what others could swap out, and what its container allows."""
    available = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([available, *_container_limits()])


def _container_limits() -> Sequence[int]:
    """Bytes that the control group still allows; empty without a limit."""
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


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Inside, an environment variable has this value; afterwards it is what it was, or not there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute of a library's module or class is ``value``; afterwards it is what it was."""
    before = vars(owner)[name]  # a class would hand out a static method or class method without what makes it one
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
