"""One answer at a time, said piece by piece while it is written: by a model in this process, or by an endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.generation.caller import run
from daekit.generation.calls import ChatRequest, Message
from daekit.generation.endpoint import Endpoint, PassingFailure, RefusedRequest
from daekit.generation.keys import Permissions, required_key
from daekit.generation.local import Sampling, generate
from daekit.generation.local_chat import encode_chat
from daekit.recipe.judge import JudgeSpec

Say = Callable[[str], None]
_PART = "\N{REPLACEMENT CHARACTER}"  # at the end of a text: bytes of a letter that is not whole yet


@dataclass
class LocalSpeaker:
    """A model in this process; ``context`` is what it reads at most, in tokens (None: nobody knows)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int | None

    def answer(self, messages: Sequence[Message], how: Sampling, say: Say, stop: threading.Event) -> str:
        """The whole answer; each piece goes to ``say`` as it comes. Once ``stop`` is set it ends early, with what there is.

        Raises:
            UserError: the conversation leaves no room for an answer.
        """
        prompt = encode_chat(self.tokenizer, messages)
        limit = how.max_new_tokens if self.context is None else min(how.max_new_tokens, self.context - len(prompt))
        if limit < 1:
            raise UserError(f"the conversation has {len(prompt):,} tokens, and the model reads {self.context:,}")
        said = ""

        def tell(text: str) -> None:
            nonlocal said
            if not text.endswith(_PART) and text.startswith(said):
                say(text[len(said) :])
                said = text

        def watch(ids_BT: Tensor) -> bool:
            tell(self.tokenizer.decode(ids_BT[0, len(prompt) :].tolist(), skip_special_tokens=True))
            return stop.is_set()

        sampling = [Sampling(limit, how.temperature, how.seed, how.top_p)]
        ids = generate(self.model, self.tokenizer, [prompt], max_new_tokens=limit, sampling=sampling, watch=watch)[0]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        tell(text)
        return text


class EndpointSpeaker:
    """A model at an OpenAI-compatible endpoint.

    Args:
        where: begins errors.
        url: its base URL.
        model: its name there.
        key_variable: environment variable that holds the key.
        allowed: which keys may be sent where.

    Raises:
        UserError: see ``required_key``.
    """

    def __init__(self, where: str, url: str, model: str, key_variable: str | None, allowed: Permissions) -> None:
        self._who, self._spec = where, JudgeSpec(base_url=url, model=model, api_key_env=key_variable, concurrency=1)
        self._key = required_key(where, url, key_variable, allowed)

    def answer(self, messages: Sequence[Message], how: Sampling, say: Say, stop: threading.Event) -> str:
        """The same; UserError where there is no answer."""
        parameters = {"stream": True, "max_tokens": how.max_new_tokens, "temperature": how.temperature, "seed": how.seed[0]}
        try:
            return run(self._answer(ChatRequest(messages, parameters), say, stop))
        except (PassingFailure, RefusedRequest) as error:
            raise UserError(f"{self._who} at {self._spec.endpoint}: {error}") from None

    async def _answer(self, request: ChatRequest, say: Say, stop: threading.Event) -> str:
        said = []
        async with (
            aclosing(Endpoint(self._who, self._spec, self._key)) as endpoint,
            aclosing(endpoint.pieces(request)) as pieces,
        ):
            async for piece in pieces:
                said.append(piece)
                say(piece)
                if stop.is_set():
                    break
        return "".join(said)


Speaker = LocalSpeaker | EndpointSpeaker  # answers conversations
