"""Rows that a model writes, attempt by attempt: what is drawn depends on an attempt's number alone, never on its batch.

``LocalAuthor`` and ``EndpointAuthor`` write drafts; ``write_rows`` has each judged, keeps it on disk before the next batch, and
goes on where it was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient
from daekit.generation.drafts import Attempt, Counts, Draft, DraftStore, Judge
from daekit.generation.local import Sampling, generate
from daekit.generation.user_turn import UserTurn
from daekit.progress import clock
from daekit.recipe.generated import GeneratedSpec

Prompt = Mapping[str, Any]  # a row without its answer: ``prompt``, and what else is given (``tools``, ``teacher_prompt``...)
_EVERY = 10.0  # seconds between two lines of progress
_HOPELESS = 200  # attempts; if none of so many is a row, none will be
_CALLS_PER_WORKER = 8  # of an endpoint in one batch


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
        """Attempts that it writes together."""
        return self.spec.batch_size

    def write(self, first: int, prompts: Sequence[Prompt]) -> list[Draft]:
        """The attempts ``first``, ``first + 1``..., one for each prompt."""
        spec, numbers = self.spec, range(first, first + len(prompts))
        how = Sampling(spec.max_new_tokens, spec.temperature, top_p=spec.top_p)
        if spec.prompts.written == "bos":
            answers = self._continue([self.start] * len(prompts), numbers, 1, how)
            return [self._draft({}, "text", ids, spec.max_new_tokens) for ids in answers]
        drafts: dict[int, Draft] = {}
        asked = dict(zip(numbers, prompts, strict=True))
        if self.turn is not None:
            longest = spec.prompts.max_new_tokens
            turns = Sampling(longest, spec.prompts.temperature or spec.temperature, top_p=spec.prompts.top_p or spec.top_p)
            said = self._continue([self.turn.opening] * len(numbers), numbers, 0, turns, [self.turn.end])
            for number, ids in zip(numbers, said, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                asked[number] = {"prompt": [{"role": "user", "content": text}]}
                if len(ids) >= longest:
                    drafts[number] = Draft(None, "", len(ids), "open_turn")
                elif not text.strip():
                    drafts[number] = Draft(None, "", len(ids), "empty")
        open_numbers = [number for number in numbers if number not in drafts]
        answers = self._continue([self.encode(asked[number]) for number in open_numbers], open_numbers, 1, how)
        for number, ids in zip(open_numbers, answers, strict=True):
            drafts[number] = self._draft(asked[number], "completion", ids, spec.max_new_tokens)
        return [drafts[number] for number in numbers]

    def _continue(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], part: int, how: Sampling, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """What follows each prompt; ``part`` tells the draws of an attempt's user turn from those of its answer."""
        sampling = [replace(how, seed=(self.spec.seed, number, part)) for number in numbers]
        options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "batch_size": self.batch_size}
        return generate(self.model, self.tokenizer, prompts, sampling=sampling, stop=stop, **options)

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
        tokenizer: the run's; what it counts is compared with what the endpoint counts.
    """

    client: ChatClient
    tokenizer: PreTrainedTokenizerBase
    spec: GeneratedSpec

    @property
    def batch_size(self) -> int:
        """Attempts that it writes together."""
        return max(self.spec.batch_size, _CALLS_PER_WORKER * self.spec.concurrency)

    def write(self, first: int, prompts: Sequence[Prompt]) -> list[Draft]:
        """The attempts ``first``, ``first + 1``..., one for each prompt.

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
            tokens = len(self.tokenizer(reply.text, add_special_tokens=False)["input_ids"])
            theirs = reply.completion_tokens
            differs = theirs is not None and theirs not in (tokens, tokens + 1)  # some count the end of turn
            drafts.append(Draft(_row(prompt, "completion", reply.text), reply.text, tokens, fate, differs))
        return drafts


Author = LocalAuthor | EndpointAuthor


def _row(prompt: Prompt, column: str, text: str) -> dict[str, Any]:
    """The training row: an answer takes the form of its prompt."""
    conversation = isinstance(prompt.get("prompt"), list)
    return {**prompt, column: [{"role": "assistant", "content": text}] if conversation else text}


def write_rows(
    make_author: Callable[[], AbstractContextManager[Author]],
    prompts: Sequence[Prompt],
    spec: GeneratedSpec,
    store: DraftStore,
    where: str,
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
        judge.remember(kept)
    _count(counts, store.attempts, spec, most, where)
    if not _is_enough(counts, spec, most):
        before, start = replace(counts, fates=counts.fates.copy()), time.monotonic()
        last = start
        with make_author() as author:
            while not _is_enough(counts, spec, most):
                numbers = range(counts.attempts, min(counts.attempts + author.batch_size, most))
                drafts = author.write(numbers[0], [prompts[n % len(prompts)] if prompts else {} for n in numbers])
                judged = [judge(draft) for draft in drafts]
                store.add(judged)
                _count(counts, judged, spec, most, where)
                if time.monotonic() - last >= _EVERY:
                    last = time.monotonic()
                    print(f"[{where}] {_progress(counts, before, spec, most, last - start)}", flush=True)
    if spec.rows is not None and counts.kept < spec.rows:
        raise UserError(
            f"{where}.rows: {counts.attempts:,} attempts gave {counts.kept:,} of {spec.rows:,} rows ({counts}). Give more "
            f"attempts, or ask for fewer rows; what is written is kept. {_remedy(counts, spec)}"
        )
    if not counts.kept:
        raise UserError(f"{where}: none of {counts.attempts:,} attempts is a row ({counts}). {_remedy(counts, spec)}")
    return counts


def _is_enough(counts: Counts, spec: GeneratedSpec, most: int) -> bool:
    """Whether there are as many rows as wanted, or as many attempts as allowed."""
    return counts.kept == spec.rows or counts.attempts >= most


def _count(counts: Counts, attempts: Sequence[Attempt], spec: GeneratedSpec, most: int, where: str) -> None:
    """Count attempts until there are enough.

    A model that never ends, or never writes what is asked for, is told after few attempts; a fixed number of them, so that it
    does not depend on batches.
    """
    for attempt in attempts:
        if _is_enough(counts, spec, most):
            return
        counts.add(attempt)
        if counts.attempts == _HOPELESS and not counts.kept:
            raise UserError(f"{where}: none of the first {_HOPELESS} attempts is a row ({counts}). {_remedy(counts, spec)}")


def _progress(counts: Counts, before: Counts, spec: GeneratedSpec, most: int, seconds: float) -> str:
    """``before``: what was there when this process began."""
    done, begun, total = (
        (counts.attempts, before.attempts, most) if spec.rows is None else (counts.kept, before.kept, spec.rows)
    )
    left = f", about {clock((total - done) * seconds / (done - begun))} left" if done > begun else ""
    speed = (counts.tokens - before.tokens) / max(seconds, 1e-9)
    return f"{done:,} of {total:,}: {counts}; {speed:,.0f} tokens/s{left}"


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
