"""What is asked of a judge and what comes back, as plain containers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
CHARACTERS_PER_TOKEN = 4  # of English, roughly; only estimates use it


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge.

    Attributes:
        messages: ``{"role", "content"}`` each.
        parameters: fields of the OpenAI chat protocol besides ``model`` and ``messages``: ``max_tokens``, ``temperature``,
            ``logprobs``...
        repeat: 0, 1... where the same question is to be asked several times.
        label: what it is about, for messages and error files; no part of its identity.
    """

    messages: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0
    label: str = ""

    @property
    def characters(self) -> int:
        """Length of the prompt."""
        return sum(len(message["content"]) for message in self.messages)

    def key(self, model: str, endpoint: str) -> str:
        """Hash of everything that the answer depends on."""
        parts = [list(map(dict, self.messages)), model, endpoint, dict(self.parameters), self.repeat]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class JudgeReply:
    """One answer of the judge.

    Attributes:
        text: of its first choice (the arguments, where it was asked to call a function).
        response: the endpoint's whole answer (``choices``, ``usage``, ``model``...).
        time: seconds since 1970 at which it came.
    """

    text: str
    response: Mapping[str, Any]
    time: float

    @property
    def model(self) -> str | None:
        """The name that the endpoint returned."""
        return self.response.get("model")


@dataclass(frozen=True)
class Estimate:
    """What a benchmark would still cost. Tokens are guessed from characters; replies are counted at their longest.

    Attributes:
        calls: that are still to be sent.
        cached: answers that are there already.
        prompt_tokens: of the calls, about.
        completion_tokens: of the calls, at most.
        cost: dollars, at most; None without prices.
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
