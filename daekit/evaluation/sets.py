"""Validation rows, tokenised as TRL's SFTTrainer tokenises them for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from daekit.data.responses import ResponseLabels, render, require_markers, template_options
from daekit.errors import UserError
from daekit.protocol import IGNORE_INDEX


@dataclass(frozen=True)
class TokenizedRow:
    """One validation row.

    Attributes:
        input_ids: all tokens.
        labels: -100 on the tokens that do not count (the prompt).
        prompt_ids: what to generate after, as at inference; None for a row of ``text`` or a conversation without an
            answer.
        prompt: the prompt to show to a reader.
        reference: the text that the row answers with.
        answer: the right result in any manner, from the column ``answer``.
        boundary_differs: the tokenised prompt is not a prefix of the whole row (tokens merge, or the chat template
            differs), so that the model was trained on another context than it sees here.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int] | None = None
    prompt: str = ""
    reference: str = ""
    answer: str | None = None
    boundary_differs: bool = False


@dataclass(frozen=True)
class EvaluationSet:
    """The validation rows of one source.

    Attributes:
        overlong: number of rows that were left out because they are longer than ``max_length`` tokens.
        left_out: their places in the data.
    """

    domain: str
    rows: tuple[TokenizedRow, ...]
    overlong: int = 0
    max_length: int | None = None
    left_out: tuple[int, ...] = ()

    def fingerprint(self) -> str:
        """A hash of the tokens of all rows and of which of them are scored."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((list(row.input_ids), list(row.labels))).encode())
        return digest.hexdigest()[:16]

    def notes(self, source: str) -> list[str]:
        """What a reader of the report must know about these rows."""
        notes = []
        if self.overlong:
            notes.append(
                f"{source}: {self.overlong} of {self.overlong + len(self.rows)} validation rows are longer than max_length = "
                f"{self.max_length} tokens and were left out."
            )
        if differing := sum(row.boundary_differs for row in self.rows):
            notes.append(
                f"{source}: in {differing} of {len(self.rows)} validation rows the tokenised prompt is not a prefix of the "
                "tokenised row, so the context to generate from differs from the one in training."
            )
        return notes


def tokenize_rows(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    domain: str,
    max_length: int | None = None,
    overlong: Literal["error", "drop"] = "error",
    limit: int | None = None,
    assistant_only_loss: bool | None = None,
) -> EvaluationSet:
    """Tokenise rows of ``prompt`` + ``completion``, ``messages`` or ``text`` (plain or conversational) and mask their
    prompts.

    The ids and labels are those that daekit's trainers train on: completions of prompt-completion rows, the response of
    messages (``daekit.data.responses``), all of a text. ``assistant_only_loss`` True or False means what it means in TRL.

    Args:
        source: name of the source, for messages.
        max_length: longest row in tokens; None: any length.
        overlong: what becomes of longer rows; ``drop`` counts them.
        limit: use the first so many rows.

    Raises:
        UserError: for a row without the needed columns or without tokens that count, an empty ``answer``, a row that is
            too long, a set without rows, a tokenizer without ``eos_token`` or, for conversations, without chat
            template.
    """
    rows, longest, left_out = [], 0, []
    where = f"source {source!r}, validation row"
    for index, row in enumerate(tokenize_each(islice(dataset, limit), tokenizer, where, assistant_only_loss)):
        if max_length is not None and len(row.input_ids) > max_length:
            left_out.append(index)
            longest = max(longest, len(row.input_ids))
        else:
            rows.append(row)
    dropped = len(left_out)
    if dropped and overlong == "error":
        raise UserError(
            f"source {source!r}: {dropped} of {dropped + len(rows)} validation rows are longer than max_length = {max_length} "
            f"tokens (the longest has {longest}): raise max_length, or leave them out of the evaluation with overlong: drop."
        )
    if not rows:
        why = f": all {dropped} are longer than max_length = {max_length} tokens" if dropped else ""
        raise UserError(f"source {source!r} has no validation rows to evaluate on{why}.")
    return EvaluationSet(domain, tuple(rows), dropped, max_length, tuple(left_out))


def tokenize_each(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    assistant_only_loss: bool | None = None,
) -> Iterator[TokenizedRow]:
    """Tokenise rows one by one, as ``tokenize_rows`` does.

    Args:
        where: begins an error about a row; its number, counted from 0, follows.

    Raises:
        UserError: a row that cannot be tokenised, that the chat template refuses, or that has no token that counts.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos_token: training appends it to every answer. Set tokenizer.eos_token.")
    tokenise = _Tokenise(tokenizer, assistant_only_loss)
    for index, example in enumerate(dataset):
        yield tokenise(example, f"{where} {index}")


class _Tokenise:
    """One row at a time, by the steps of ``SFTTrainer._prepare_dataset`` (a test holds the two together)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool | None) -> None:
        self.tokenizer = tokenizer
        self.assistant_only_loss = bool(assistant_only_loss)
        self.chat_template: str | None = None
        self.responses: ResponseLabels | None = None
        if tokenizer.chat_template is None:
            return
        if assistant_only_loss:
            require_markers(tokenizer)
        if assistant_only_loss is not False:
            responses = ResponseLabels.of(tokenizer)
            self.chat_template = responses.template if assistant_only_loss else None
            self.responses = None if assistant_only_loss else responses

    def __call__(self, example: Mapping[str, Any], where: str) -> TokenizedRow:
        from trl import is_conversational

        # a table of rows of several forms has None where a row lacks a column
        row = {key: value for key, value in example.items() if value is not None}
        conversational = is_conversational(row)
        if conversational and self.tokenizer.chat_template is None:
            raise UserError(f"{where} is a conversation, but the tokenizer has no chat template: set tokenizer.chat_template.")
        if "prompt" in row and "completion" in row:
            tokenized = self._conversation(row, where) if conversational else self._completion(row)
        elif "messages" in row:
            tokenized = self._messages(row, where)
        elif "text" in row:
            text = row["text"] + ("" if row["text"].endswith(self.tokenizer.eos_token) else self.tokenizer.eos_token)
            ids = self.tokenizer(text=text)["input_ids"]
            tokenized = TokenizedRow(ids, list(ids))
        else:
            raise UserError(
                f"{where} has the columns {', '.join(sorted(row)) or 'none'}: it needs prompt and completion, "
                "messages, or text (rename columns with the source's `columns`)."
            )
        if all(label == IGNORE_INDEX for label in tokenized.labels[1:]):
            raise UserError(f"{where} has no token to predict: its answer is empty. Remove the row.")
        return _with_answer(tokenized, row, where)

    def _completion(self, row: Mapping[str, Any]) -> TokenizedRow:
        eos = self.tokenizer.eos_token
        prompt, completion = row["prompt"], row["completion"]
        ended = completion if completion.endswith(eos) else completion + eos
        prompt_ids = self.tokenizer(text=prompt)["input_ids"]
        ids = self.tokenizer(text=prompt + ended)["input_ids"]
        return self._masked(prompt_ids, ids, prompt, completion.removesuffix(eos))

    def _conversation(self, row: Mapping[str, Any], where: str) -> TokenizedRow:
        prompt_ids = self._render(row["prompt"], row, where, add_generation_prompt=True)["input_ids"]
        whole = self._render(row["prompt"] + row["completion"], row, where, markers=self.assistant_only_loss)
        reference = "\n".join(message["content"] for message in row["completion"])
        masked = self._masked(prompt_ids, whole["input_ids"], _shown(row["prompt"]), reference)
        if not self.assistant_only_loss:
            return masked
        labels = [
            label if assistant else IGNORE_INDEX
            for label, assistant in zip(masked.labels, whole["assistant_masks"], strict=True)
        ]
        return replace(masked, labels=labels)

    def _messages(self, row: Mapping[str, Any], where: str) -> TokenizedRow:
        messages = row["messages"]
        if self.responses is not None:
            whole = self.responses(row, self.tokenizer, where)
            ids, labels = whole["input_ids"], whole["labels"]
        else:
            whole = self._render(messages, row, where, markers=self.assistant_only_loss)
            ids, labels = whole["input_ids"], list(whole["input_ids"])
            if self.assistant_only_loss:
                masks = whole["assistant_masks"]
                labels = [token if assistant else IGNORE_INDEX for token, assistant in zip(ids, masks, strict=True)]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            return TokenizedRow(ids, labels)
        prompt_ids = self._render(messages[:-1], row, where, add_generation_prompt=True)["input_ids"]
        masked = self._masked(prompt_ids, ids, _shown(messages[:-1]), messages[-1]["content"])
        return replace(masked, labels=labels)

    def _render(self, messages: list[dict[str, Any]], row: Mapping[str, Any], where: str, **how: bool) -> dict[str, list[int]]:
        return render(self.tokenizer, messages, where, template=self.chat_template, options=template_options(row), **how)

    def _masked(self, prompt_ids: list[int], ids: list[int], prompt: str, reference: str) -> TokenizedRow:
        from trl.data_utils import common_prefix_length

        start = common_prefix_length(prompt_ids, ids)
        boundary_differs = start < len(prompt_ids)
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id and start == len(prompt_ids) - 1:
            # a tokenizer that ends every text with EOS: at inference the answer would start after the end
            prompt_ids, boundary_differs = prompt_ids[:-1], False
        labels = [IGNORE_INDEX] * start + ids[start:]
        return TokenizedRow(ids, labels, prompt_ids, prompt, reference.strip(), boundary_differs=boundary_differs)


def _shown(messages: list[dict[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _with_answer(tokenized: TokenizedRow, row: Mapping[str, Any], where: str) -> TokenizedRow:
    if "answer" not in row:
        return tokenized
    answer = str(row["answer"]).strip()
    if not answer:
        raise UserError(
            f"{where}: its answer is empty, and would be found in every generated text. Fill it or remove the column."
        )
    return replace(tokenized, answer=answer)
