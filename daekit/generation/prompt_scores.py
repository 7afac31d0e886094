"""Log-probabilities of the tokens of a prompt, from a completions API that gives them (vLLM's ``prompt_logprobs``).

The request holds the prompt as token ids; ``choices[0].prompt_logprobs`` of the answer holds null for the first token and, for
each further one, ``{token id: {"logprob", "rank", "decoded_token"}}`` of the K most likely tokens and of the token itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

from daekit.errors import UserError
from daekit.generation.budget import Budget
from daekit.generation.caller import Caller, GivenUp, each, run
from daekit.generation.calls import at, read_body
from daekit.generation.endpoint import Endpoint, PassingFailure
from daekit.generation.keys import Permissions, required_key
from daekit.recipe.judge import JudgeSpec

Entry = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ScoreRequest:
    """A prompt whose tokens are to be scored.

    Attributes:
        prompt: Token ids, or a text that the server tokenises, with its special tokens.
        k: How many tokens are named at each position besides the prompt's own.
    """

    prompt: tuple[int, ...] | str
    k: int
    path: ClassVar = "completions"
    parameters: ClassVar[Mapping[str, Any]] = {}
    completion_tokens: ClassVar = 1

    def question(self) -> dict[str, Any]:
        """What is sent, besides the model's name. Servers want to generate at least one token."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        asked = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": self.k, "return_token_ids": True}
        return {"prompt": prompt, **asked}

    @property
    def prompt_tokens(self) -> int:
        """Of a text, its characters."""
        return len(self.prompt)


@dataclass(frozen=True)
class PromptScores:
    """A whole answer.

    Attributes:
        entries: One for each token of the prompt: None for the first, else token id -> ``logprob`` and more.
        token_ids: The prompt as the server has tokenised it; None if it does not say.
    """

    entries: Sequence[Entry | None]
    token_ids: Sequence[int] | None
    text: ClassVar = ""
    prompt_tokens: ClassVar = None
    completion_tokens: ClassVar = None


class ScoreClient:
    """Asks for scores with the retries, the concurrency and the key rules of ``ChatClient``; keeps nothing.

    Raises:
        UserError: The key is missing, or may not be sent there; the endpoint may not be asked without encryption.
    """

    def __init__(self, spec: JudgeSpec, who: str, allowed: Permissions, first_wait: float = 1.0) -> None:
        assert spec.base_url is not None
        self._key = required_key(who, spec.base_url, spec.api_key_env, allowed)
        self.spec, self._who = spec, who
        self._caller = Caller(spec, Budget(spec), first_wait, who)

    def ask(self, requests: Sequence[ScoreRequest]) -> list[PromptScores]:
        """The answer to each request.

        Raises:
            UserError: One of them is refused, or has failed ``max_retries`` times.
        """
        found: dict[ScoreRequest, PromptScores] = {}
        run(self._ask(dict.fromkeys(requests), found))
        return [found[request] for request in requests]

    async def _ask(self, requests: Iterable[ScoreRequest], found: dict[ScoreRequest, PromptScores]) -> None:
        async with aclosing(Endpoint(self._who, self.spec, self._key)) as endpoint:
            self._caller.resume_at = 0.0  # on the clock of an earlier event loop

            async def ask(request: ScoreRequest) -> None:
                try:
                    scores = await self._caller.call(endpoint, request, lambda body: read_scores(body, request))
                except GivenUp as error:
                    raise UserError(f"{self._who} at {self.spec.endpoint}: {error}{_remedy(str(error))}") from None
                assert scores is not None, "its budget has no limits"
                found[request] = scores

            await each(requests, ask, self.spec.concurrency)


def read_scores(body: str, request: ScoreRequest) -> PromptScores:
    """The scores in the body of an answer.

    Raises:
        PassingFailure: There are none, or not of all tokens, as in half an answer.
    """
    choice = at(read_body(body), "choices", 0)
    entries = at(choice, "prompt_logprobs")
    if not isinstance(entries, list) or not all(entry is None or isinstance(entry, dict) for entry in entries):
        raise PassingFailure(f"its answer holds no prompt_logprobs: {body[:200]!r}")
    if not isinstance(request.prompt, str) and len(entries) != len(request.prompt):
        raise PassingFailure(f"it scores {len(entries)} of {len(request.prompt)} tokens")
    return PromptScores(entries, at(choice, "prompt_token_ids"))


def _remedy(failure: str) -> str:
    if "max allowed" in failure:
        return ". Start the server with a larger --max-logprobs, or ask for fewer tokens (k)."
    if "prompt_logprobs" in failure:
        return ". The server must be one that scores prompts, as vLLM does."
    if "context length" in failure or "max_model_len" in failure:
        return ". Start the server with a larger --max-model-len, or make the rows shorter (max_length)."
    return ". What is complete is kept; run again when it answers."
