"""What the environment says of this process: its place among those of a launcher; what is set for a while and set back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def rank(local: bool = False) -> int:
    """The number of this process among those of a launcher (``local``: on this machine); 0 without one."""
    return int(os.environ.get("LOCAL_RANK" if local else "RANK", "0"))


def ranks_here() -> int:
    """How many processes a launcher has started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
