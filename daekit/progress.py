"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

ProgressFunction = Callable[[int, int], None]  # (done, total), called as often as is convenient
_EVERY = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """Shows the progress of one piece of work; call it with (done, total), and ``close`` it.

    Args:
        label: what is being done.
        unit: what is counted.
    """

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self._bar: Any = None
        self._start: tuple[float, int] | None = None
        self._said = time.monotonic()
        self._part = ""

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done."""
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, desc=self._label(), unit=f" {self.unit}", leave=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        start, first = self._start = self._start or (now, done)
        if now - self._said >= _EVERY:
            left = f", {clock((total - done) * (now - start) / (done - first))} left" if done > first else ""
            self.say(f"{self._label()}: {done:,} of {total:,} {self.unit}{left}")

    def part(self, what: str, done: int, total: int) -> None:
        """The same of a piece of work with several parts, one after another."""
        if what != self._part:
            self.close()
            self._part, self._start = what, None
        self(done, total)

    def say(self, line: str) -> None:
        """Print a line above the bar; it counts as a sign of life."""
        from tqdm import tqdm  # the command line imports this file, and answers at once

        tqdm.write(line)
        sys.stdout.flush()
        self._said = time.monotonic()

    def _label(self) -> str:
        return f"{self.label} {self._part}".rstrip()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def clock(seconds: float) -> str:
    """Minutes and seconds, ``3:07``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
