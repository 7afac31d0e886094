"""What is asked of a chat model and what comes back, as plain containers; a reply is read whatever its form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Message = Mapping[str, str]
CHARACTERS_PER_TOKEN = 4  # of English, roughly; only estimates use it
_MOST_TOKENS = 10**9  # a usage beyond it is no count
_LONGEST_NAME = 200  # characters of a model's name that are kept


@dataclass(frozen=True)
class ChatRequest:
    """One question.

    Attributes:
        messages: ``{"role", "content"}`` each.
        parameters: Fields of the OpenAI chat protocol besides ``model`` and ``messages``: ``max_tokens``, ``temperature``,
            ``logprobs``...
        repeat: 0, 1... where the same question is to be asked several times.
        label: What it is about, for messages and error files; no part of its identity.
    """

    messages: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0
    label: str = ""
    path: ClassVar = "chat/completions"

    def question(self) -> dict[str, Any]:
        """What is sent, besides the model's name."""
        return {"messages": [dict(message) for message in self.messages], **self.parameters}

    @property
    def prompt_tokens(self) -> int:
        """A guess from the characters."""
        characters = sum(len(message["content"]) for message in self.messages)
        return tokens_of(characters) + 4 * len(self.messages)

    @property
    def completion_tokens(self) -> int:
        """The most that the reply may have."""
        return int(self.parameters.get("max_tokens") or 0)

    def key(self, model: str, endpoint: str) -> str:
        """Hash of everything that the answer depends on."""
        parts = [list(map(dict, self.messages)), model, endpoint, dict(self.parameters), self.repeat]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ChatReply:
    """One answer, read from the body of a response; what of it is odd is None.

    Attributes:
        text: Of its first choice (the arguments, where it was asked to call a function). Half a surrogate pair is replaced.
        model: The name that the endpoint returned.
        finish_reason: Such as ``stop`` or ``length``.
        top_logprobs: ``{"token", "logprob"}`` of the likeliest first tokens.
        prompt_tokens: As the endpoint counts them.
        completion_tokens: Likewise.
        time: Seconds since 1970 at which it came.
    """

    text: str
    model: str | None
    finish_reason: str | None
    top_logprobs: list[dict[str, Any]] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    time: float

    @property
    def is_cut(self) -> bool:
        """Whether the text ended only because no more tokens were allowed; one token that was asked for is not cut."""
        return self.finish_reason == "length" and self.top_logprobs is None


@dataclass(frozen=True)
class Estimate:
    """What a benchmark would still cost. Tokens are guessed from characters; replies are counted at their longest.

    Attributes:
        calls: That are still to be sent.
        cached: Answers that are there already.
        prompt_tokens: Of the calls, about.
        completion_tokens: Of the calls, at most.
        cost: Dollars, at most; None without prices.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        price = "price unknown" if self.cost is None else f"at most ${self.cost:,.2f}"
        return (
            f"{self.calls} calls ({self.cached} answers are there already), about {self.prompt_tokens:,} tokens of prompts, "
            f"at most {self.completion_tokens:,} of replies, {price}"
        )


def tokens_of(characters: int) -> int:
    """A guess."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def read_body(body: str) -> dict[str, Any] | None:
    """The object in the body of a response; None where it holds none."""
    try:
        # Python reads no integer of more than 4,300 digits, and none of ours has 20
        content = json.loads(body, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_reply(body: str, time: float) -> ChatReply | None:
    """The answer in a body; None where there is none (no JSON object, an error message, no choice).

    An answer whose message is no text is an answer with an empty text: it was given and paid, and to ask again would not help.
    """
    response = read_body(body)
    choice = at(response, "choices", 0)
    text = _text(at(choice, "message"))
    if choice is None or (text is None and at(response, "error")):
        return None
    model, reason = at(response, "model"), at(choice, "finish_reason")
    return ChatReply(
        text=clean_text(text or ""),
        model=clean_text(model)[:_LONGEST_NAME] if isinstance(model, str) and model else None,
        finish_reason=reason if isinstance(reason, str) else None,
        top_logprobs=_top_logprobs(choice),
        prompt_tokens=_count(at(response, "usage", "prompt_tokens")),
        completion_tokens=_count(at(response, "usage", "completion_tokens")),
        time=time,
    )


def lacks_logprobs(body: str) -> bool:
    """Whether an endpoint has left log-probabilities out, as one does that has none; odd ones do not count."""
    logprobs = at(read_body(body), "choices", 0, "logprobs")
    return not logprobs or (isinstance(logprobs, dict) and not logprobs.get("content"))


def clean_text(text: str) -> str:
    """A text that can be written as UTF-8: half a surrogate pair becomes U+FFFD, a pair in two halves one character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys and indices in plain containers; None where something else lies on the way."""
    try:
        for step in path:
            value = value[step] if isinstance(value, (dict, list)) else None  # type: ignore[index]
    except (LookupError, TypeError):
        return None
    return value


def _text(message: Any) -> str | None:
    """The arguments of a call, the content, or the texts among its parts; None for a refusal or anything else."""
    called = at(message, "tool_calls", 0, "function", "arguments")
    content = at(message, "content") if called is None else called
    if isinstance(content, list):
        parts = [part["text"] for part in content if isinstance(at(part, "text"), str)]
        return "".join(parts) if parts else None
    return content if isinstance(content, str) else None


def _top_logprobs(choice: Any) -> list[dict[str, Any]] | None:
    top = at(choice, "logprobs", "content", 0, "top_logprobs")
    if not isinstance(top, list):
        return None
    found = []
    for entry in top:
        token, value = at(entry, "token"), at(entry, "logprob")
        if isinstance(token, str) and isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            found.append({"token": clean_text(token), "logprob": float(value)})
    return found or None


def _count(value: Any) -> int | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value < _MOST_TOKENS else None  # NaN and infinity are not within
