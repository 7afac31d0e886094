"""How a chat model is made to write the user's turn: its template up to where the user speaks, and the token that ends it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError

_REMEDY = "Set a chat template that does (tokenizer.chat_template), or write after `bos` or given prompts"


@dataclass(frozen=True)
class UserTurn:
    """Tokens around what the user says.

    Attributes:
        opening: before it.
        end: the token right behind it.
    """

    opening: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, where: str) -> UserTurn:
        """The user's turn of a tokenizer's chat template; ``where`` begins errors.

        Raises:
            UserError: no template, or one whose user turn cannot be opened: nothing stands before it, it is written otherwise
                than as it was said, or no single special token ends it.
        """
        if tokenizer.chat_template is None:
            raise UserError(f"{where}: self needs a chat template, and the model's tokenizer has none. {_REMEDY}.")
        mark = secrets.token_hex(8)
        try:
            text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
        except Exception as error:  # a template is a program
            raise UserError(f"{where}: self: the chat template takes no user's turn alone ({error}). {_REMEDY}.") from error
        before, found, after = text.partition(mark)
        opening = tokenizer(before, add_special_tokens=False)["input_ids"]
        closing = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
        if not found or mark in after or not opening:
            raise UserError(
                f"{where}: self: the chat template does not open the user's turn with tokens of its own. {_REMEDY}."
            )
        if not closing or closing[0] not in tokenizer.added_tokens_decoder:
            raise UserError(
                f"{where}: self: the chat template ends the user's turn with ordinary text ({after.strip()[:20]!r}), not with "
                f"a special token, so the model cannot be stopped there. {_REMEDY}."
            )
        return cls(tuple(opening), closing[0])
