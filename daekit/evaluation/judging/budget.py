"""What a run may send and spend, and what it has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daekit.evaluation.judging.calls import CHARACTERS_PER_TOKEN, Estimate, JudgeRequest
from daekit.recipe.judge import JudgeSpec

_EVERY = 10.0  # seconds between two lines of progress


def price(spec: JudgeSpec, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Dollars, or None without prices."""
    if spec.price_prompt is None or spec.price_completion is None:
        return None
    return (prompt_tokens * spec.price_prompt + completion_tokens * spec.price_completion) / 1e6


def estimate(spec: JudgeSpec, requests: Sequence[JudgeRequest], done: Iterable[str], identity: str) -> Estimate:
    """What asking ``requests`` would cost when the keys ``done`` are answered."""
    by_key = {request.key(spec.name, identity): request for request in requests}
    answered = set(done)
    open_requests = [request for key, request in by_key.items() if key not in answered]
    prompt = sum(_prompt_tokens(request) for request in open_requests)
    completion = sum(_completion_tokens(request) for request in open_requests)
    cost = price(spec, prompt, completion)
    return Estimate(len(open_requests), len(by_key) - len(open_requests), prompt, completion, cost)


class Budget:
    """Counts calls, tokens and dollars of one engine. Limits hold for it and those ``before`` it together.

    Attributes:
        calls: sent, repeated ones included.
        retries: of them, those that repeat another.
        failed: requests that were given up.
        stopped: the limit that was reached, in words; None while there is none.
    """

    def __init__(self, spec: JudgeSpec, before: Sequence[Budget] = ()) -> None:
        self._spec = spec
        self.calls: int = 0
        self.retries = self.failed = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.cost: float = 0.0
        self._calls_before, self._cost_before = sum(each.calls for each in before), sum(each.cost for each in before)
        self._reserved = 0.0
        self.stopped: str | None = None

    def tight(self, request: JudgeRequest) -> bool:
        """Whether only the calls under way stand between ``request`` and ``max_cost``: what they leave is not known yet."""
        if self._spec.max_cost is None or self.stopped:
            return False
        most = self._most(request)
        spent = self._cost_before + self.cost
        return spent + most <= self._spec.max_cost < spent + self._reserved + most

    def begin(self, request: JudgeRequest) -> bool:
        """Whether one more call may be sent. Its price at most is set aside until ``end``, so that calls under way together
        never spend more than ``max_cost``."""
        spec, most, spent = self._spec, self._most(request), self._cost_before + self.cost
        if spec.max_calls is not None and self._calls_before + self.calls >= spec.max_calls:
            self.stopped = f"max_calls={spec.max_calls} is reached"
        elif spec.max_cost is not None and spent + self._reserved + most > spec.max_cost:
            self.stopped = f"max_cost={spec.max_cost} would be exceeded (${spent:.4f} spent)"
        if self.stopped:
            return False
        self.calls += 1
        self._reserved += most
        return True

    def end(self, request: JudgeRequest, usage: Mapping[str, Any] | None) -> None:
        """A call came back, with what it used (None: it failed)."""
        self._reserved -= self._most(request)
        if usage is None:
            return
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        # an endpoint that does not say is charged what was guessed, at most
        self.prompt_tokens += prompt if prompt is not None else _prompt_tokens(request)
        self.completion_tokens += completion if completion is not None else _completion_tokens(request)
        self.cost = price(self._spec, self.prompt_tokens, self.completion_tokens) or 0.0

    def _most(self, request: JudgeRequest) -> float:
        # guessed with twice the tokens that English has
        return price(self._spec, 2 * _prompt_tokens(request), _completion_tokens(request)) or 0.0


class Progress:
    """Prints ``[judge gpt-4] 120/160  3.1 calls/s  0:13 left  $0.42  4 repeated`` every ten seconds and at the end."""

    def __init__(self, who: str, spec: JudgeSpec, budget: Budget, total: int) -> None:
        self._who, self._spec, self._budget, self._total = who, spec, budget, total
        self._done = 0
        self._start = self._last = time.monotonic()

    def step(self) -> None:
        """One more request is answered or given up."""
        self._done += 1
        if time.monotonic() - self._last >= _EVERY:
            self.show()

    def show(self) -> None:
        """Print the line."""
        self._last = time.monotonic()
        speed = self._done / max(self._last - self._start, 1e-9)
        parts = [f"[{self._who}] {self._done}/{self._total}", f"{speed:.1f} calls/s"]
        if speed and self._done < self._total:
            left = int((self._total - self._done) / speed)
            parts.append(f"{left // 60}:{left % 60:02d} left")
        if self._spec.price_prompt is not None:
            parts.append(f"${self._budget.cost:.2f}")
        parts += [
            f"{count} {what}" for count, what in ((self._budget.retries, "repeated"), (self._budget.failed, "failed")) if count
        ]
        print("  ".join(parts), flush=True)


def _prompt_tokens(request: JudgeRequest) -> int:
    return -(-request.characters // CHARACTERS_PER_TOKEN) + 4 * len(request.messages)


def _completion_tokens(request: JudgeRequest) -> int:
    return int(request.parameters.get("max_tokens") or 0)
