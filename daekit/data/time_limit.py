"""A limit for programs that come with a model: a chat template can loop for as long as it likes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Run the block under a limit of CPU time. Only the main thread can be interrupted: in another one there is no limit.

    Args:
        seconds: CPU time that the process may use within the block.

    Raises:
        TimeoutError: the block has used more.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
