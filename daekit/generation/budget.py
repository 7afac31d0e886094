"""What a run may send and spend, and what it has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from daekit.generation.calls import ChatReply, ChatRequest, Estimate, tokens_of
from daekit.progress import ProgressFunction, clock
from daekit.recipe.judge import JudgeSpec

_IMPLAUSIBLE = 2  # a usage so many times below what we count ourselves is not believed


def price(spec: JudgeSpec, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Dollars, or None without prices."""
    if spec.price_prompt is None or spec.price_completion is None:
        return None
    return (prompt_tokens * spec.price_prompt + completion_tokens * spec.price_completion) / 1e6


def estimate(spec: JudgeSpec, requests: Sequence[ChatRequest], done: Iterable[str], identity: str) -> Estimate:
    """What asking ``requests`` would cost when the keys ``done`` are answered."""
    by_key = {request.key(spec.name, identity): request for request in requests}
    answered = set(done)
    open_requests = [request for key, request in by_key.items() if key not in answered]
    prompt = sum(request.prompt_tokens for request in open_requests)
    completion = sum(request.completion_tokens for request in open_requests)
    cost = price(spec, prompt, completion)
    return Estimate(len(open_requests), len(by_key) - len(open_requests), prompt, completion, cost)


class Budget:
    """Counts calls, tokens and dollars of one client. Limits hold for it and those ``before`` it together.

    Attributes:
        calls: calls that were sent, repeated ones included.
        retries: those of them that repeat another.
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

    def tight(self, request: ChatRequest) -> bool:
        """Whether only the calls under way stand between ``request`` and ``max_cost``: what they leave is not known yet."""
        if self._spec.max_cost is None or self.stopped:
            return False
        most = self._most(request)
        spent = self._cost_before + self.cost
        return spent + most <= self._spec.max_cost < spent + self._reserved + most

    def begin(self, request: ChatRequest) -> bool:
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

    def end(self, request: ChatRequest, reply: ChatReply | None, body: str | None = None) -> None:
        """A call came back: with a reply, with a body that holds none (which is paid all the same), or with nothing.

        What an endpoint counts is believed down to half of our own count; one that does not say is charged at most.
        """
        self._reserved -= self._most(request)
        if reply is None and body is None:
            return
        visible = tokens_of(len(reply.text if reply is not None else body or ""))
        prompt, completion = (None, None) if reply is None else (reply.prompt_tokens, reply.completion_tokens)
        self.prompt_tokens += _plausible(prompt, request.prompt_tokens, otherwise=request.prompt_tokens)
        self.completion_tokens += _plausible(completion, visible, otherwise=max(request.completion_tokens, visible))
        self.cost = price(self._spec, self.prompt_tokens, self.completion_tokens) or 0.0

    def _most(self, request: ChatRequest) -> float:
        # guessed with twice the tokens that English has
        return price(self._spec, 2 * request.prompt_tokens, request.completion_tokens) or 0.0


class Counter:
    """Tells ``progress`` how far the requests are, and prints it at the end:
    ``[judge gpt-4] 120/160  3.1 calls/s  0:13 left  $0.42  4 repeated``."""

    def __init__(self, who: str, spec: JudgeSpec, budget: Budget, total: int, progress: ProgressFunction | None) -> None:
        self._who, self._spec, self._budget, self._total, self._progress = who, spec, budget, total, progress
        self._done, self._failed_before = 0, budget.failed
        self._start = time.monotonic()

    def step(self) -> None:
        """One more request is answered."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def show(self) -> None:
        """Print the line."""
        speed = self._done / max(time.monotonic() - self._start, 1e-9)
        parts = [f"[{self._who}] {self._done}/{self._total}", f"{speed:.1f} calls/s"]
        still = self._total - self._done - (self._budget.failed - self._failed_before)
        if speed and still > 0:
            parts.append(f"{clock(still / speed)} left")
        if self._spec.price_prompt is not None:
            parts.append(f"${self._budget.cost:.2f}")
        counts = {"repeated": self._budget.retries, "failed": self._budget.failed}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        print("  ".join(parts), flush=True)


def _plausible(said: int | None, counted: int, *, otherwise: int) -> int:
    return otherwise if said is None or said * _IMPLAUSIBLE < counted else said
