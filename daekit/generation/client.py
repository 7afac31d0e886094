"""The one client: every question is answered once, whatever happens in between."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType

from daekit.errors import UserError
from daekit.generation.budget import Budget, Counter
from daekit.generation.caller import Caller, GivenUp, each, run
from daekit.generation.calls import ChatReply, ChatRequest, lacks_logprobs, read_reply
from daekit.generation.endpoint import Endpoint, PassingFailure
from daekit.generation.keys import Permissions, endpoint_key
from daekit.generation.local_chat import LocalChat, model_fingerprint
from daekit.generation.store import ERRORS, UNREADABLE, ReplyStore
from daekit.progress import ProgressFunction
from daekit.recipe.judge import JudgeSpec

_PILOTS = 3  # requests sent one by one before the first success
_IN_A_ROW = 10  # requests given up one after another before the run ends: the endpoint is down
_SHOWN = 300  # characters of a reply that an error quotes

Open = tuple[str, ChatRequest]


class ChatClient:
    """Asks one model, keeps every reply in ``folder``, and asks nothing twice.

    A context manager: while it is open, no other process can use the folder. Limits (``max_calls``, ``max_cost``) hold for all
    that one client is asked.

    Attributes:
        spec: who is asked.
        folder: where replies are kept.
        budget: what was sent and spent so far.

    Args:
        role: what the one that is asked is called in messages.
        first_wait: seconds before a failed call is first repeated; doubled each time.
        before: what other clients have sent to the same model; limits hold for all of it.
        allowed: which keys may be sent where.
        progress: called with (done, total).

    Raises:
        UserError: the spec contradicts itself; its key may not be sent there; another process uses the folder; a file in it
            is damaged.
    """

    def __init__(
        self,
        spec: JudgeSpec,
        folder: Path,
        *,
        role: str = "judge",
        first_wait: float = 1.0,
        before: Sequence[Budget] = (),
        allowed: Permissions = Permissions(),
        progress: ProgressFunction | None = None,
    ) -> None:
        require_sound(spec)
        self._key = "" if spec.base_url is None else endpoint_key(role, spec.base_url, spec.api_key_env, allowed)
        self._progress = progress
        self.spec, self.folder, self.budget = spec, folder, Budget(spec, before)
        self.identity = identity(spec)
        self._who = f"{role} {spec.name}"
        self._caller = Caller(spec, self.budget, first_wait, self._who)
        self._store = ReplyStore(folder)
        if self._store.was_torn:
            print(f"[{self._who}] {folder}: the last line was torn (the run was killed); its call is sent again", flush=True)
        self._local: LocalChat | None = None
        self._in_a_row = 0

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store.close()

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply | None]:
        """The reply to each request, None where there is none (see ``errors.jsonl``, or a limit was reached).

        Raises:
            UserError: no call can succeed; replies that came before are kept.
        """
        keys = [self.key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._store.replies}
        if missing:
            progress = Counter(self._who, self.spec, self.budget, len(missing), self._progress)
            try:
                if self.spec.path is not None:
                    self._generate(list(missing.items()), progress)
                else:
                    run(self._send(missing.items(), progress))
            finally:
                progress.show()
        return [self._store.replies.get(key) for key in keys]

    def key(self, request: ChatRequest) -> str:
        """Under which the reply to ``request`` is kept."""
        return request.key(self.spec.name, self.identity)

    def reply(self, request: ChatRequest) -> ChatReply | None:
        """The reply that is there already."""
        return self._store.replies.get(self.key(request))

    def why(self) -> str:
        """Why requests have no reply, as far as one reason holds for all, and the file with the reason of each."""
        file = str(self.folder / ERRORS)
        return f"{self.budget.stopped}; {file}" if self.budget.stopped else file

    def notes(self, requests: Sequence[ChatRequest]) -> list[str]:
        """What a reader must know about the replies to ``requests``."""
        notes = []
        replies = [reply for reply in map(self.reply, requests) if reply is not None]
        models = sorted({reply.model for reply in replies if reply.model})
        if len(models) > 1:
            notes.append(f"{self._who}: the endpoint answered as several models: {', '.join(models)}.")
        cut = sum(reply.is_cut for reply in replies)
        if cut:
            notes.append(
                f"{self._who}: {cut} of {len(replies)} replies were cut at max_tokens, or where the judge's context ends."
            )
        return notes

    def _generate(self, missing: list[Open], progress: Counter) -> None:
        """By the local judge, batch by batch; each batch is kept before the next one begins."""
        if self._local is None:
            self._local = LocalChat(self.spec)
        allowed = [open_request for open_request in missing if self.budget.begin(open_request[1])]
        for at, body in self._local.answer([request for _, request in allowed]):
            key, request = allowed[at]
            self.budget.end(request, self._store.add(key, request.label, body))
            progress.step()

    async def _send(self, missing: Iterable[Open], progress: Counter) -> None:
        async with aclosing(Endpoint(self._who, self.spec, self._key)) as endpoint:
            self._caller.resume_at = 0.0  # on the clock of an earlier event loop
            queue = iter(missing)
            if not self._caller.has_answered:
                await self._pilots(endpoint, queue, progress)

            async def work(question: Open) -> None:
                if self.budget.stopped:
                    return
                failure = await self._answer(endpoint, *question, progress)
                self._in_a_row = self._in_a_row + 1 if isinstance(failure, PassingFailure) else 0
                if self._in_a_row >= _IN_A_ROW:
                    self.budget.stopped = f"{_IN_A_ROW} requests in a row failed, the last with: {failure}"

            await each(queue, work, self.spec.concurrency)

    async def _pilots(self, endpoint: Endpoint, queue: Iterator[Open], progress: Counter) -> None:
        """Send the first requests one by one until one is answered: what is wrong with the endpoint is said after few calls,
        and no call is made for the purpose."""
        for key, request in itertools.islice(queue, _PILOTS):
            failure = await self._answer(endpoint, key, request, progress)
            if failure is None:
                if reply := self._store.replies.get(key):  # None: a limit kept it from being sent
                    who = reply.model or "a model that it does not name"
                    print(f"[{self._who}] {self.spec.endpoint} answers as {who}", flush=True)
                return
            if isinstance(failure, PassingFailure) and failure.unreachable:
                self.budget.stopped = f"{self.spec.endpoint} is not reached: {failure}"
                return
        if not self._store.replies and not self.budget.stopped:
            self.budget.stopped = f"the first requests all failed, the last with: {failure}"

    async def _answer(self, endpoint: Endpoint, key: str, request: ChatRequest, progress: Counter) -> Exception | None:
        """Send one request until it is answered or given up; returns why it was given up.

        A request that a limit keeps from being sent is no failure.
        """
        try:
            reply = await self._caller.call(endpoint, request, lambda body: self._keep(key, request, body))
        except GivenUp as error:
            self.budget.failed += 1
            self._store.add_error(key, request.label, str(error), error.attempts)
            return error.reason
        if reply is not None:
            progress.step()
        return None

    def _keep(self, key: str, request: ChatRequest, body: str) -> ChatReply:
        """Keep what has arrived, and read it."""
        if request.parameters.get("logprobs") and read_reply(body, 0.0) is not None and lacks_logprobs(body):
            raise UserError(
                f"{self._who} at {self.spec.endpoint}: it sends no logprobs, which the annotator needs. Choose an annotator "
                "that reads the judge's text (annotator: alpaca_eval_gpt4), or an endpoint that has logprobs."
            )
        reply = self._store.add(key, request.label, body)
        if reply is None:
            raise PassingFailure(f"no answer can be read in the reply (see {UNREADABLE}): {body[:_SHOWN]!r}")
        return reply


def require_sound(spec: JudgeSpec) -> None:
    """Raises: UserError: the spec contradicts itself."""
    problems = [f"judge.{key}: {sentence}" for key, sentence in spec.problems()]
    if problems:
        raise UserError("\n".join(problems))


def identity(spec: JudgeSpec) -> str:
    """What tells this judge from others besides its name: the endpoint, or the path and what lies there."""
    if spec.path is None:
        return spec.endpoint
    return f"{spec.path}#{model_fingerprint(spec.path)},{spec.dtype},{spec.quantization or 'plain'}"
