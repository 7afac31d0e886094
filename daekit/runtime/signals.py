"""A run that is told to end saves a checkpoint at the next step boundary, or ends at once where there is nothing to save."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daekit.environment import rank
from daekit.errors import Stopped

GRACE = 25.0  # seconds; torchrun kills its processes 30 s after it has passed a signal on
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_LOOK = 1.0  # seconds between two looks after the launcher
_SAME_REQUEST = 1.0  # seconds: a scheduler signals a whole job, and the launcher passes on what its processes have got already
_PEER, _END = 255, 0  # no numbers of signals


class StopRequest:
    """Handles the signals that tell a run to end; a context manager around the run.

    The first signal is a request. While ``saving`` it is left to ``SaveOnSignal``; at any other time ``Stopped`` is raised in
    the main thread. A second signal, or the end of the grace time, ends the process at once with the signal's status. That is
    decided by a thread, which the signal reaches while the main thread waits for a device or another rank. Signals that were
    ignored before (``nohup``) stay so. Outside of the main thread nothing is handled.

    Args:
        grace: seconds between the request and the end of the process.
        before_end: called before the process is ended without its own clean-up.
    """

    def __init__(self, grace: float = GRACE, before_end: Callable[[], None] = lambda: None) -> None:
        self.grace, self.before_end = grace, before_end
        self.signum = 0
        self.is_saving = False
        self._process = os.getpid()
        # a launcher that is killed leaves its ranks behind: they would go on, and hold the machine, with nobody to end them
        self._launcher = os.getppid() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._in_main_thread)
        os.register_at_fork(after_in_child=self._in_child)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="daekit-signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous)
        self._handlers = {}
        self._writer.send(bytes([_END]))
        self._thread.join()
        self._reader.close()
        self._writer.close()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While inside, a request waits for a step boundary."""
        self.is_saving = True
        try:
            yield
        finally:
            self.is_saving = False
        if self.signum:  # it came after the last step
            raise Stopped(self.signum)

    def agreed(self) -> int:
        """The signal that any rank has got, 0 for none. A collective call."""
        signum = self.signum
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            highest = torch.tensor(signum, device=PartialState().device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            signum = int(highest)
        if signum and not self.signum:
            self.signum = signum
            if self._handlers:
                self._writer.send(bytes([_PEER]))
        return signum

    def _in_main_thread(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process: its parent ends it, by SIGTERM
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        first, self.signum = not self.signum, self.signum or signum
        if first and not self.is_saving:
            raise Stopped(signum)

    def _in_child(self) -> None:
        if self._handlers:
            signal.set_wakeup_fd(-1)  # the descriptor is the parent's

    def _watch(self) -> None:
        """Runs in a thread: what has to happen whatever the main thread is doing."""
        asked = end = float("inf")
        while True:
            wait = None if end == float("inf") else max(end - time.monotonic(), 0)
            if self._launcher is not None:
                wait = _LOOK if wait is None else min(wait, _LOOK)
            if not select.select([self._reader], [], [], wait)[0]:
                if time.monotonic() >= end:
                    self._end_now(self.signum, f"nothing was saved within {self.grace:g} s (--grace)")
                self._look_after_launcher()
                continue
            for number in self._reader.recv(64):
                if number == _END:
                    return
                now = time.monotonic()
                if number in self._handlers:
                    if now - asked > _SAME_REQUEST:
                        self._end_now(number, "a second signal: the run ends at once")
                    asked = min(asked, now)
                elif number != _PEER:
                    continue
                if end == float("inf"):
                    end = now + self.grace
                    self._announce(number)

    def _look_after_launcher(self) -> None:
        """Stop as for SIGTERM where the launcher of this rank is gone."""
        if self._launcher not in (None, os.getppid()):
            self._launcher = None
            print(f"[stop] rank {rank()}: its launcher was killed", flush=True)
            os.kill(self._process, signal.SIGTERM)

    def _announce(self, number: int) -> None:
        if self.is_saving and rank() == 0:
            name = "another rank was told to stop" if number == _PEER else signal.Signals(number).name
            print(
                f"[stop] {name}: a checkpoint is saved at the next step boundary, within {self.grace:g} s; a second signal "
                "ends the run at once",
                flush=True,
            )

    def _end_now(self, number: int, reason: str) -> None:
        print(f"[stop] {reason}; the same command goes on from the newest checkpoint", flush=True)
        self.before_end()
        os._exit(128 + number)


class SaveOnSignal(TrainerCallback):
    """Saves a checkpoint at the step boundary at which the ranks agree that a signal has come, and raises ``Stopped``.

    The last step of an epoch is saved after what belongs to the end of the epoch, an evaluation that is due before the save:
    the resumed run would do neither again.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self._agreed, self._is_due = 0, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the other ranks; the last step of an epoch is followed by ``on_epoch_end``."""
        self._agreed, self._is_due = self.stop.agreed(), not float(state.epoch or 0).is_integer()
        self._save(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save what ``on_step_end`` has put off."""
        self._is_due = True
        self._save(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A signal may have come during the evaluation, which is followed by the save of its step."""
        if self.stop.is_saving:
            self._agreed = self.stop.agreed()
            self._save(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is whole."""
        if self._agreed and self._is_due:
            raise Stopped(self._agreed, f"checkpoint-{state.global_step} is saved")

    def _save(self, control: TrainerControl) -> None:
        if self._agreed and self._is_due:
            control.should_save = True
