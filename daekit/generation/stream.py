"""One answer at a time, said piece by piece while it is written: by a model in this process, or by an endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.generation.calls import Message, clean_text, read_reply
from daekit.generation.keys import Permissions, endpoint_key, masked
from daekit.generation.local import Sampling, generate
from daekit.generation.local_chat import encode_chat

Say = Callable[[str], None]
_TIMEOUT = 120.0  # seconds without a piece
_SHOWN = 300  # characters of an endpoint's message
_PART = "\N{REPLACEMENT CHARACTER}"  # at the end of a text: bytes of a letter that is not whole yet


class Speaker(Protocol):
    """Answers a conversation."""

    def answer(self, messages: Sequence[Message], how: Sampling, say: Say, stop: threading.Event) -> str:
        """The whole answer; each piece goes to ``say`` as it comes. Once ``stop`` is set it ends early, with what there is.

        Raises:
            UserError: there is no answer.
        """


@dataclass
class LocalSpeaker:
    """A model in this process; ``context`` is what it reads at most, in tokens (None: nobody knows)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int | None

    def answer(self, messages: Sequence[Message], how: Sampling, say: Say, stop: threading.Event) -> str:
        """See ``Speaker``."""
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
        UserError: see ``endpoint_key``.
    """

    def __init__(self, where: str, url: str, model: str, key_variable: str | None, allowed: Permissions) -> None:
        self._url, self._model = f"{url.rstrip('/')}/chat/completions", model
        self._key = endpoint_key(where, url, key_variable, allowed)

    def answer(self, messages: Sequence[Message], how: Sampling, say: Say, stop: threading.Event) -> str:
        """See ``Speaker``."""
        body: dict[str, Any] = {"model": self._model, "messages": [dict(message) for message in messages], "stream": True}
        body |= {"max_tokens": how.max_new_tokens, "temperature": how.temperature, "seed": how.seed[0]}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        said = []
        try:
            with (
                httpx.Client(timeout=_TIMEOUT, headers=headers, follow_redirects=False) as client,
                client.stream("POST", self._url, json=body) as response,
            ):
                for piece in self._pieces(response):
                    said.append(piece)
                    say(piece)
                    if stop.is_set():
                        break
        except httpx.HTTPError as error:
            raise UserError(f"{self._url}: {type(error).__name__}: {masked(str(error), self._key)[:_SHOWN]}") from None
        return "".join(said)

    def _pieces(self, response: httpx.Response) -> Iterator[str]:
        """The texts of server-sent events; of an endpoint that does not stream, its whole answer."""
        if not response.is_success:
            message = masked(response.read().decode(errors="replace"), self._key)[:_SHOWN]
            raise UserError(f"{self._url}: HTTP {response.status_code}: {' '.join(message.split())}")
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            reply = read_reply(response.read().decode(errors="replace"), 0.0)
            if reply is None:
                raise UserError(f"{self._url}: no answer can be read in its reply")
            yield reply.text
            return
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            try:
                piece = json.loads(data)["choices"][0]["delta"].get("content")
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                continue  # usage alone, or a comment of the endpoint's own
            if isinstance(piece, str) and piece:
                yield clean_text(piece)
