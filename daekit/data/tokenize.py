"""What a row becomes: the tokens of rows of any form and which of them carry loss, for training and evaluation alike.

Ids and labels are those of TRL's ``SFTTrainer`` (a test holds the two together), but for the labels of ``messages``: see
``daekit.data.responses``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from daekit.data.responses import ROWS_AT_ONCE, ResponseLabels, render, render_all, require_markers, template_options
from daekit.data.rows import UNFINISHED
from daekit.data.teacher_prompts import TEACHER_PROMPT, TeacherPrompts, teacher_row
from daekit.errors import UserError
from daekit.protocol import IGNORE_INDEX

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TokenizedRow:
    """One row as a model sees it.

    Attributes:
        input_ids: all tokens.
        labels: -100 on the tokens that carry no loss (the prompt).
        prompt_ids: what to generate after, as at inference; None for a row of ``text`` or a conversation without an answer.
        prompt: the prompt to show to a reader.
        reference: the text that the row answers with.
        answer: the right result in any style, from the column ``answer``.
        boundary_differs: the tokenised prompt is not a prefix of the whole row (tokens merge, or the chat template differs), so
            that the model was trained on another context than it sees here.
        teacher_prompt_ids: what its teacher sees in place of the tokens before the response; None: the same tokens.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int] | None = None
    prompt: str = ""
    reference: str = ""
    answer: str | None = None
    boundary_differs: bool = False
    teacher_prompt_ids: list[int] | None = None


def tokenize_each(
    dataset: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    assistant_only_loss: bool | None = None,
    prompts: bool = True,
) -> Iterator[TokenizedRow]:
    """Tokenise rows of ``prompt`` + ``completion``, ``messages`` or ``text`` (plain or conversational), some hundred at a time.

    Args:
        where: begins an error about a row; its number, counted from 0, follows.
        assistant_only_loss: of conversations: True and False mean what they mean in TRL; None: the response.
        prompts: whether ``messages`` rows get a prompt to generate after, which training needs not.

    Raises:
        UserError: a row without the needed columns or without tokens that carry loss, one that the chat template refuses, an
            empty ``answer``; in the end, rows whose response is other tokens behind ``teacher_prompt``; a tokenizer without
            ``eos_token`` or, for conversations, without chat template.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos_token: training appends it to every answer. Set tokenizer.eos_token.")
    tokenise, rows, done = _Tokenise(tokenizer, assistant_only_loss, prompts), iter(dataset), 0
    told = TeacherPrompts(tokenizer, where)
    # a table of rows of several forms has None where a row lacks a column
    while part := [{key: value for key, value in row.items() if value is not None} for row in islice(rows, ROWS_AT_ONCE)]:
        places = [f"{where} {done + at}" for at in range(len(part))]
        yield from _with_teacher_prompts(tokenise, part, places, told)
        done += len(part)
    told.raise_if_any()


class _Tokenise:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool | None, prompts: bool) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.assistant_only_loss = bool(assistant_only_loss)
        self.chat_template: str | None = None
        self.responses: ResponseLabels | None = None
        if tokenizer.chat_template is None:
            return
        if assistant_only_loss:
            require_markers(tokenizer)
            self.chat_template = ResponseLabels.of(tokenizer).template
        elif assistant_only_loss is None:
            self.responses = ResponseLabels.of(tokenizer)

    def __call__(self, rows: Sequence[Row], places: Sequence[str]) -> list[TokenizedRow]:
        ways = list(map(self._way, rows, places))
        if len(set(ways)) > 1:
            return [each for row, place in zip(rows, places, strict=True) for each in self([row], [place])]
        made = list(map(_checked, ways[0](rows, places), rows, places))
        return [self._open(*each) if each[1].get(UNFINISHED) else each[0] for each in zip(made, rows, places, strict=True)]

    def _open(self, tokenized: TokenizedRow, row: Row, place: str) -> TokenizedRow:
        """A row whose answer was cut: what stands behind its last word carries no loss, for its model did not write it."""
        from trl import is_conversational
        from trl.data_utils import common_prefix_length

        ids, end = tokenized.input_ids, len(tokenized.input_ids)
        if is_conversational(row):
            messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
            template = self.responses.template if "messages" in row and self.responses else self.chat_template
            options = {**template_options(row), "continue_final_message": True}
            end = common_prefix_length(
                render(self.tokenizer, messages, place, template=template, options=options)["input_ids"], ids
            )
        while end and ids[end - 1] == self.tokenizer.eos_token_id:  # some tokenizers add one to every text
            end -= 1
        return replace(tokenized, labels=tokenized.labels[:end] + [IGNORE_INDEX] * (len(ids) - end))

    def _way(self, row: Row, place: str) -> Callable[[Sequence[Row], Sequence[str]], Iterator[TokenizedRow]]:
        """The method for the form of a row."""
        from trl import is_conversational

        conversational = is_conversational(row)
        if conversational and self.tokenizer.chat_template is None:
            raise UserError(f"{place} is a conversation, but the tokenizer has no chat template: set tokenizer.chat_template.")
        if "prompt" in row and "completion" in row:
            return self._conversations if conversational else self._completions
        if "messages" in row or "text" in row:
            return self._messages if "messages" in row else self._texts
        raise UserError(
            f"{place} has the columns {', '.join(sorted(row)) or 'none'}: it needs prompt and completion, "
            "messages, or text (rename columns with the source's `columns`)."
        )

    def _texts(self, rows: Sequence[Row], places: Sequence[str]) -> Iterator[TokenizedRow]:
        return (TokenizedRow(ids, list(ids)) for ids in self._ids([self._ended(row["text"]) for row in rows]))

    def _completions(self, rows: Sequence[Row], places: Sequence[str]) -> Iterator[TokenizedRow]:
        prompts = self._ids([row["prompt"] for row in rows])
        wholes = self._ids([row["prompt"] + self._ended(row["completion"]) for row in rows])
        for row, prompt_ids, ids in zip(rows, prompts, wholes, strict=True):
            yield self._masked(prompt_ids, ids, row["prompt"], row["completion"].removesuffix(self.tokenizer.eos_token))

    def _conversations(self, rows: Sequence[Row], places: Sequence[str]) -> Iterator[TokenizedRow]:
        prompts = self._rendered([row["prompt"] for row in rows], rows, places, add_generation_prompt=True)
        together = [row["prompt"] + row["completion"] for row in rows]
        wholes = self._rendered(together, rows, places, markers=self.assistant_only_loss)
        for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
            reference = "\n".join(message["content"] for message in row["completion"])
            masked = self._masked(prompt["input_ids"], whole["input_ids"], _shown(row["prompt"]), reference)
            yield masked if not self.assistant_only_loss else replace(masked, labels=_marked(masked.labels, whole))

    def _messages(self, rows: Sequence[Row], places: Sequence[str]) -> Iterator[TokenizedRow]:
        if self.responses is not None:
            wholes = self.responses.label(rows, self.tokenizer, places)
        else:
            wholes = self._rendered([row["messages"] for row in rows], rows, places, markers=self.assistant_only_loss)
            for whole in wholes:
                ids = whole["input_ids"]
                whole["labels"] = _marked(ids, whole) if self.assistant_only_loss else list(ids)
        said = [row["messages"] for row in rows]
        chosen = [at for at, each in enumerate(said) if self.prompts and len(each) > 1 and each[-1]["role"] == "assistant"]
        asked = [rows[at]["messages"][:-1] for at in chosen]
        prompts = self._rendered(asked, [rows[at] for at in chosen], [places[at] for at in chosen], add_generation_prompt=True)
        prompt_of = dict(zip(chosen, prompts, strict=True))
        for at, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
            if at not in prompt_of:
                yield TokenizedRow(whole["input_ids"], whole["labels"])
                continue
            *before, last = row["messages"]
            masked = self._masked(prompt_of[at]["input_ids"], whole["input_ids"], _shown(before), last["content"])
            yield replace(masked, labels=whole["labels"])

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(text=texts)["input_ids"]

    def _rendered(self, conversations: Sequence[Any], rows: Sequence[Row], places: Sequence[str], **how: bool) -> Any:
        options = list(map(template_options, rows))
        return render_all(self.tokenizer, conversations, places, template=self.chat_template, options=options, **how)

    def _masked(self, prompt_ids: list[int], ids: list[int], prompt: str, reference: str) -> TokenizedRow:
        from trl.data_utils import common_prefix_length

        start = common_prefix_length(prompt_ids, ids)
        boundary_differs = start < len(prompt_ids)
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id and start == len(prompt_ids) - 1:
            # a tokenizer that ends every text with EOS: at inference the answer would start after the end
            prompt_ids, boundary_differs = prompt_ids[:-1], False
        labels = [IGNORE_INDEX] * start + ids[start:]
        return TokenizedRow(ids, labels, prompt_ids, prompt, reference.strip(), boundary_differs=boundary_differs)


def _with_teacher_prompts(
    tokenise: _Tokenise, rows: Sequence[Row], places: Sequence[str], told: TeacherPrompts
) -> list[TokenizedRow]:
    """Tokenised rows, those with a ``teacher_prompt`` once more as their teacher sees them, for the tokens of it."""
    own, chosen = tokenise(rows, places), [at for at, row in enumerate(rows) if TEACHER_PROMPT in row]
    if chosen:
        names = [f"{places[at]} (teacher_prompt)" for at in chosen]
        seen = tokenise([teacher_row(rows[at], places[at]) for at in chosen], names)
        for at, row in zip(chosen, seen, strict=True):
            own[at] = replace(own[at], teacher_prompt_ids=told.ids(vars(own[at]), vars(row), places[at]))
    return own


def _marked(labels: Sequence[int], whole: Mapping[str, list[int]]) -> list[int]:
    return [label if mark else IGNORE_INDEX for label, mark in zip(labels, whole["assistant_masks"], strict=True)]


def _shown(messages: Sequence[Row]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _checked(tokenized: TokenizedRow, row: Row, place: str) -> TokenizedRow:
    """The row with its answer."""
    if all(label == IGNORE_INDEX for label in tokenized.labels[1:]):
        raise UserError(f"{place} has no token to predict: its answer is empty. Remove the row.")
    if "answer" not in row:
        return tokenized
    answer = str(row["answer"]).strip()
    if not answer:
        raise UserError(
            f"{place}: its answer is empty, and would be found in every generated text. Fill it or remove the column."
        )
    return replace(tokenized, answer=answer)
