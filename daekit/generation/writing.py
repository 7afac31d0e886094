"""Rows that a model writes, attempt by attempt: what is drawn depends on an attempt's number alone, never on its batch.

``LocalAuthor`` and ``EndpointAuthor`` write drafts; ``write_rows`` has each judged, keeps it on disk before the next batch, and
goes on where it was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient
from daekit.generation.drafts import Counts, Draft, DraftStore, Judge
from daekit.generation.local import Sampling, generate
from daekit.generation.user_turn import UserTurn
from daekit.progress import clock
from daekit.recipe.generated import GeneratedSpec

Prompt = Mapping[str, Any]  # a row without its answer: ``prompt``, and what else is given (``tools``, ``teacher_prompt``...)
_EVERY = 10.0  # seconds between two lines of progress
_HOPELESS = 200  # attempts; if none of so many is a row, none will be
_CALLS_PER_WORKER = 8  # of an endpoint in one batch


class Author(Protocol):
    """Writes drafts."""

    @property
    def batch_size(self) -> int:
        """Attempts that it writes together."""

    def write(self, first: int, prompts: Sequence[Prompt]) -> list[Draft]:
        """The attempts ``first``, ``first + 1``..., one for each prompt."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass
class LocalAuthor:
    """A model in this process.

    Attributes:
        encode: a prompt as the tokens after which the answer begins.
        turn: how the model is made to write the user's turn, where it does.
        start: the tokens that a text begins with, where there is no prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: GeneratedSpec
    encode: Callable[[Prompt], list[int]]
    turn: UserTurn | None = None
    start: Sequence[int] = ()

    @property
    def batch_size(self) -> int:
        """See ``Author``."""
        return self.spec.batch_size

    def write(self, first: int, prompts: Sequence[Prompt]) -> list[Draft]:
        """See ``Author``."""
        spec, numbers = self.spec, range(first, first + len(prompts))
        if spec.prompts.written == "bos":
            answers = self._continue([self.start] * len(prompts), numbers, 1)
            return [self._draft({}, "text", ids, spec.max_new_tokens) for ids in answers]
        drafts: dict[int, Draft] = {}
        asked = dict(zip(numbers, prompts, strict=True))
        if self.turn is not None:
            for number, ids in zip(numbers, self._user_turns(numbers), strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                asked[number] = {"prompt": [{"role": "user", "content": text}]}
                if len(ids) >= spec.prompts.max_new_tokens:
                    drafts[number] = Draft(None, "", len(ids), "open_turn")
                elif not text.strip():
                    drafts[number] = Draft(None, "", len(ids), "empty")
        open_numbers = [number for number in numbers if number not in drafts]
        answers = self._continue([self.encode(asked[number]) for number in open_numbers], open_numbers, 1)
        for number, ids in zip(open_numbers, answers, strict=True):
            drafts[number] = self._draft(asked[number], "completion", ids, spec.max_new_tokens)
        return [drafts[number] for number in numbers]

    def close(self) -> None:
        """See ``Author``."""

    def _user_turns(self, numbers: Sequence[int]) -> list[list[int]]:
        assert self.turn is not None
        prompts = self.spec.prompts
        return self._continue(
            [self.turn.opening] * len(numbers),
            numbers,
            0,
            limit=prompts.max_new_tokens,
            temperature=prompts.temperature or self.spec.temperature,
            top_p=prompts.top_p or self.spec.top_p,
            stop=[self.turn.end],
        )

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        part: int,
        *,
        limit: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """What follows each prompt; ``part`` tells the draws of an attempt's user turn from those of its answer."""
        spec, limit = self.spec, limit or self.spec.max_new_tokens
        how = (spec.temperature if temperature is None else temperature, spec.top_p if top_p is None else top_p)
        sampling = [Sampling(limit, how[0], (spec.seed, number, part), how[1]) for number in numbers]
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=limit,
            batch_size=self.batch_size,
            sampling=sampling,
            stop=stop,
        )

    def _draft(self, prompt: Prompt, column: str, ids: list[int], limit: int) -> Draft:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        fate = "empty" if not text.strip() else "unfinished" if len(ids) >= limit else "written"
        differs = self.tokenizer(text, add_special_tokens=False)["input_ids"] != list(ids)
        return Draft(_row(prompt, column, text), text, len(ids), fate, differs)


@dataclass
class EndpointAuthor:
    """A model that is served.

    Attributes:
        client: asks it; what it has answered is not asked again.
        count: the tokens of a text by the run's tokenizer, compared with what the endpoint counts.
    """

    client: ChatClient
    spec: GeneratedSpec
    count: Callable[[str], int]

    @property
    def batch_size(self) -> int:
        """See ``Author``."""
        return max(self.spec.batch_size, _CALLS_PER_WORKER * self.spec.concurrency)

    def write(self, first: int, prompts: Sequence[Prompt]) -> list[Draft]:
        """See ``Author``.

        Raises:
            UserError: it did not answer all.
        """
        spec = self.spec
        parameters = {"max_tokens": spec.max_new_tokens, "temperature": spec.temperature, "top_p": spec.top_p}
        requests = [
            ChatRequest(prompt["prompt"], parameters | {"seed": (spec.seed + number) % 2**31}, number, f"attempt {number}")
            for number, prompt in enumerate(prompts, first)
        ]
        drafts = []
        for prompt, reply in zip(prompts, self.client.ask(requests), strict=True):
            if reply is None:
                raise UserError(
                    f"{self.client.spec.endpoint} did not answer every prompt (why: {self.client.why()}); "
                    "what it answered is kept, and the same command asks for the rest"
                )
            fate = "empty" if not reply.text.strip() else "unfinished" if reply.finish_reason == "length" else "written"
            tokens = self.count(reply.text)
            theirs = reply.completion_tokens
            differs = theirs is not None and theirs not in (tokens, tokens + 1)  # some count the end of turn
            drafts.append(Draft(_row(prompt, "completion", reply.text), reply.text, tokens, fate, differs))
        return drafts

    def close(self) -> None:
        """See ``Author``."""
        self.client.__exit__(None, None, None)


def _row(prompt: Prompt, column: str, text: str) -> dict[str, Any]:
    """The training row: an answer takes the form of its prompt."""
    conversation = isinstance(prompt.get("prompt"), list)
    return {**prompt, column: [{"role": "assistant", "content": text}] if conversation else text}


def write_rows(
    make_author: Callable[[], Author], prompts: Sequence[Prompt], spec: GeneratedSpec, store: DraftStore, where: str
) -> Counts:
    """Write what is missing of a source's rows; each batch is on the disk before the next begins.

    Args:
        make_author: loads the model; called if anything is missing.
        prompts: answered in turn; empty where the model writes all of a row.
        spec: what to write.
        store: attempts that were made before, and where new ones go.
        where: begins lines of progress and errors.

    Returns:
        What became of the attempts; the kept rows are in ``store``.

    Raises:
        UserError: too few rows come of the attempts, or none; what was written stays.
    """
    judge, counts = Judge(spec), Counts()
    most = spec.most_attempts or len(prompts)
    for kept in store.attempts:
        if counts.kept == spec.rows or counts.attempts == most:
            break
        judge.remember(kept)
        counts.add(kept)
        _require_hope(counts, spec, where)
    if counts.kept != spec.rows and counts.attempts < most:
        author = make_author()
        try:
            _write(author, prompts, spec, store, judge, counts, most, where)
        finally:
            author.close()
    if spec.rows is not None and counts.kept < spec.rows:
        raise UserError(
            f"{where}.rows: {counts.attempts:,} attempts gave {counts.kept:,} of {spec.rows:,} rows ({counts}). Give more "
            f"attempts, or ask for fewer rows; what is written is kept. {_remedy(counts, spec)}"
        )
    if not counts.kept:
        raise UserError(f"{where}: none of {counts.attempts:,} attempts is a row ({counts}). {_remedy(counts, spec)}")
    return counts


def _write(
    author: Author,
    prompts: Sequence[Prompt],
    spec: GeneratedSpec,
    store: DraftStore,
    judge: Judge,
    counts: Counts,
    most: int,
    where: str,
) -> None:
    """Attempts, batch by batch, until there are as many rows as wanted, or ``most`` attempts."""
    made, start = Counts(), time.monotonic()
    last = start
    while counts.kept != spec.rows and counts.attempts < most:
        first = counts.attempts
        numbers = range(first, min(first + author.batch_size, most))
        judged = [
            judge(draft) for draft in author.write(first, [prompts[n % len(prompts)] if prompts else {} for n in numbers])
        ]
        store.add(judged)
        for attempt in judged:
            if counts.kept != spec.rows:
                counts.add(attempt)
                made.add(attempt)
                _require_hope(counts, spec, where)
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            print(f"[{where}] {_progress(counts, spec, most, made, last - start)}", flush=True)


def _progress(counts: Counts, spec: GeneratedSpec, most: int, made: Counts, seconds: float) -> str:
    """``made``: of the attempts, those of this process."""
    done, total = (counts.attempts, most) if spec.rows is None else (counts.kept, spec.rows)
    now = made.attempts if spec.rows is None else made.kept
    left = f", about {clock((total - done) * seconds / now)} left" if now else ""
    return f"{done:,} of {total:,}: {counts}; {made.tokens / max(seconds, 1e-9):,.0f} tokens/s{left}"


def _require_hope(counts: Counts, spec: GeneratedSpec, where: str) -> None:
    """A model that never ends, or never writes what is asked for, is told after few attempts; a fixed number of them, so that
    it does not depend on batches."""
    if counts.attempts == _HOPELESS and not counts.kept:
        raise UserError(f"{where}: none of the first {_HOPELESS} attempts is a row ({counts}). {_remedy(counts, spec)}")


def _remedy(counts: Counts, spec: GeneratedSpec) -> str:
    worst = max(counts.fates, key=lambda fate: counts.fates[fate] if fate != "kept" else -1)
    return {
        "open_turn": f"Raise prompts.max_new_tokens={spec.prompts.max_new_tokens}, or write after `bos` or given prompts.",
        "unfinished": f"Raise max_new_tokens={spec.max_new_tokens}, or set keep_unfinished: true.",
        "duplicate": "Raise temperature, or give more prompts.",
        "near_duplicate": "Raise near_duplicates or temperature, or give more prompts.",
        "short": f"Lower min_tokens={spec.min_tokens}.",
        "unmatched": "Correct `matching`.",
    }.get(worst, "Try the model with `daekit chat`.")
