"""Several machines: which process decides, and whether all of them work on the same.

Each process reads rows and models itself, from where its own machine has them. What one writes and all read, the output
directory, must be one directory: file systems that machines share may show it late, so the main process says what lies there.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from daekit.environment import ranks_here
from daekit.errors import UserError
from daekit.files import facts_hash

T = TypeVar("T")


def connected(seconds: float | None = None) -> PartialState:
    """The processes of this run; on a CPU they are one run only if it is told so (the trainers' configs do the same).

    Args:
        seconds: how long a process waits for another that does not answer (``ddp_timeout``); None: torch's own default.
    """
    timeout = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    return PartialState(cpu=not torch.accelerator.is_available(), **timeout)


def by_main(decide: Callable[[], T]) -> T:
    """What ``decide`` returns, or the UserError that it raises, in the main process, on every rank. A collective call."""
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[0] = error
    broadcast_object_list(answer)
    result: T | UserError = answer[0]
    if isinstance(result, UserError):
        raise result
    return result


def require_shared(output_dir: Path) -> None:
    """Raise UserError on every rank where one does not see what the main process writes. A collective call."""
    if PartialState().num_processes == 1:
        return
    sign = output_dir / by_main(lambda: f".seen-by-all-{secrets.token_hex(8)}")
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        sign.touch()
    PartialState().wait_for_everyone()
    found = gather_object([(socket.gethostname(), str(output_dir.absolute()), sign.exists())])
    if PartialState().is_main_process:
        sign.unlink()
    (host, place, _), blind = found[0], [rank for rank, (_, _, sees) in enumerate(found) if not sees]
    if blind:
        other, theirs, _ = found[blind[0]]
        raise UserError(
            f"output_dir={output_dir}: rank {blind[0]} on {other} ({theirs}) does not see what rank 0 on {host} ({place}) "
            f"writes there ({len(blind)} of {len(found)} ranks do not). All machines of a run need one directory that they "
            "share: name one on a shared file system, by its absolute path."
        )


def require_same(read: Callable[[], Mapping[str, Any]]) -> None:
    """Raise UserError on every rank where the processes of several machines ``read`` different facts. A collective call."""
    if PartialState().num_processes == ranks_here():
        return
    found = gather_object([(socket.gethostname(), {key: facts_hash(value) for key, value in read().items()})])
    for rank, (host, theirs) in enumerate(found):
        if different := sorted(key for key in {*theirs, *found[0][1]} if theirs.get(key) != found[0][1].get(key)):
            raise UserError(
                f"rank {rank} on {host} has read another {different[0]} than rank 0 on {found[0][0]}: rows and models must be "
                "the same on all machines. Copy them anew, or read them from a file system that the machines share."
            )
