"""What is asked of a model, and what it answers, as plain containers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A user's turns, asked one after the other.

    Attributes:
        id: FastChat's ``question_id``.
        category: such as ``writing``.
        turns: what the user says.
        temperature: of all its answers; 0 is greedy.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    temperature: float


@dataclass(frozen=True)
class Answer:
    """A model's turns in one conversation.

    Attributes:
        turns: what it says, without white space at the ends.
        cut: of each, whether it ended only because no more tokens were allowed.
    """

    id: int
    turns: tuple[str, ...]
    cut: tuple[bool, ...]


@dataclass(frozen=True)
class HowToAnswer:
    """What answers depend on besides model and questions.

    Attributes:
        max_new_tokens: of each turn.
        system: a system message before the conversation; default: whatever the chat template does without one.
        chat_template_kwargs: further variables of the chat template (``enable_thinking: false``).
        seed: of drawn answers.
    """

    max_new_tokens: int
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def messages(self, conversation: Conversation, said: Sequence[str]) -> list[Message]:
        """The conversation up to the turn after what the model has ``said``."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn, answer in zip(conversation.turns, said, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": conversation.turns[len(said)]}]

    def facts(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)
