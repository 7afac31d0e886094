"""A request is sent until it is answered or given up, whatever it asks for."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from daekit.generation.budget import Budget
from daekit.generation.endpoint import Endpoint, PassingFailure, RefusedRequest
from daekit.generation.keys import Permissions, required_key
from daekit.recipe.judge import JudgeSpec

R = TypeVar("R")
T = TypeVar("T")
_LONGEST_WAIT = 60.0  # seconds of our own back-off
_LONGEST_ASKED = 600.0  # seconds of an endpoint's Retry-After; a request is given up rather than sent before that
_POLL = 0.02  # seconds
_UNREACHED = 2  # attempts at an endpoint that has never answered, where nobody listens


class GivenUp(Exception):
    """A request that was not answered.

    Attributes:
        reason: Of the last attempt.
        attempts: How often it was sent.
    """

    def __init__(self, reason: Exception, attempts: int) -> None:
        super().__init__(str(reason))
        self.reason, self.attempts = reason, attempts


class Caller:
    """Repeats calls that failed in passing, and keeps to a budget and to what an endpoint asks to wait.

    Attributes:
        resume_at: When the next call may be sent, on the clock of the event loop: a Retry-After holds for all calls.
        has_answered: Whether any call was answered; until then every failure is told, and to find nobody at the URL twice is
            enough.

    Args:
        budget: What may be sent.
        first_wait: Seconds before a failed call is first repeated; doubled each time.
        who: Begins the lines that it prints.
    """

    def __init__(self, spec: JudgeSpec, budget: Budget, first_wait: float, who: str) -> None:
        self._spec, self._budget, self._first_wait, self._who = spec, budget, first_wait, who
        self.resume_at = 0.0
        self.has_answered = False

    async def call(self, endpoint: Endpoint, request: Any, read: Callable[[str], R]) -> R | None:
        """What ``read`` makes of the body of an answer; None where a limit keeps the request from being sent.

        Args:
            read: It may raise PassingFailure, for a body that is no answer.

        Raises:
            GivenUp: It is refused, has failed ``max_retries`` times in passing, or nobody is there (see ``has_answered``).
            UserError: No call can succeed.
        """
        failure: Exception = PassingFailure("it was not sent")
        attempts = 0
        while attempts <= self._spec.max_retries:
            if not await self._may_send(request):
                return None
            self._budget.retries += attempts > 0
            attempts += 1
            reply: Any = None
            body = None
            try:
                async with asyncio.timeout(self._spec.timeout):  # of the whole call: a body may trickle in for ever
                    body = await endpoint.send(request)
                reply = read(body)
                self.has_answered = True
                return reply  # type: ignore[no-any-return]
            except TimeoutError:
                failure = PassingFailure(f"no whole reply within timeout={self._spec.timeout:g} seconds")
            except (PassingFailure, RefusedRequest) as error:
                failure = error
            finally:
                self._budget.end(request, reply, body)
            if not isinstance(failure, PassingFailure) or failure.wait > _LONGEST_ASKED:
                break
            if failure.unreachable and not self.has_answered and attempts >= _UNREACHED:
                break
            self.resume_at = max(self.resume_at, asyncio.get_running_loop().time() + failure.wait)
            wait = self._back_off(attempts)
            if not self.has_answered and attempts <= self._spec.max_retries:
                what, seconds = "not reached" if failure.unreachable else "no answer", math.ceil(max(wait, failure.wait))
                print(f"[{self._who}] {what} ({failure}), trying again in {seconds} s", flush=True)
            await asyncio.sleep(wait)
        raise GivenUp(failure, attempts)

    async def _may_send(self, request: Any) -> bool:
        """Wait for what an endpoint asked to wait, and for calls under way that may leave something to spend."""
        while (wait := self.resume_at - asyncio.get_running_loop().time()) > 0 or self._budget.tight(request):
            await asyncio.sleep(max(wait, _POLL))
        return self._budget.begin(request)

    def _back_off(self, attempts: int) -> float:
        if attempts > self._spec.max_retries:
            return 0.0
        most = min(self._first_wait * 2 ** (attempts - 1), _LONGEST_WAIT)
        return most * random.uniform(0.5, 1.0)  # so that calls that failed together do not come back together


async def each(items: Iterable[T], ask: Callable[[T], Coroutine[None, None, None]], together: int) -> None:
    """Ask about every item, so many at a time; an error ends the calls under way."""
    queue = iter(items)

    async def work() -> None:
        for item in queue:
            await ask(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(together):
                group.create_task(work())
    except BaseExceptionGroup as failed:  # a signal raises no Exception: it goes before what else failed
        first = min(failed.exceptions, key=lambda error: isinstance(error, Exception))
        raise first from first.__cause__


def require_answering(where: str, spec: JudgeSpec, allowed: Permissions) -> None:
    """Look for the key of an endpoint, then ask it once which models it has, which costs nothing.

    Args:
        where: Begins an error (``judge``, ``models.far``).

    Raises:
        UserError: a key that is missing, or may not be sent there; nobody listens there; the key is refused.
    """
    assert spec.base_url is not None
    key = required_key(where, spec.base_url, spec.api_key_env, allowed)

    async def look() -> None:
        async with aclosing(Endpoint(f"{where} {spec.name}", spec, key)) as endpoint:
            await endpoint.look()

    run(look())


def run(work: Coroutine[None, None, R]) -> R:
    """To its end, also inside a notebook, which has an event loop running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
