"""What a row becomes: the tokens of rows of any form and which of them carry loss, for training and evaluation alike.

Ids and labels are those of TRL's ``SFTTrainer`` (a test holds the two together), but for the labels of ``messages``: see
``daekit.data.responses``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from daekit.data.responses import ROWS_AT_ONCE, ResponseLabels, marked, render, render_all, require_markers, template_options
from daekit.data.rows import UNFINISHED, RowForm
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


class _Parts(NamedTuple):
    """What a row consists of: texts, or lists of messages. ``asked`` is what to generate after, None where there is nothing."""

    row: Row
    place: str
    form: RowForm
    whole: Any
    asked: Any = None
    reference: str = ""


class _Tokenise:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool | None, prompts: bool) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.assistant_only_loss = bool(assistant_only_loss)
        self.chat_template: str | None = None
        self.responses: ResponseLabels | None = None
        if tokenizer.chat_template is None:
            return
        if assistant_only_loss:
            self.chat_template = require_markers(tokenizer).template
        elif assistant_only_loss is None:
            self.responses = ResponseLabels.of(tokenizer)

    def __call__(self, rows: Sequence[Row], places: Sequence[str]) -> list[TokenizedRow]:
        parts = list(map(self._parts, rows, places))
        if len({part.form for part in parts}) > 1:
            return [each for row, place in zip(rows, places, strict=True) for each in self([row], [place])]
        asked = [part for part in parts if part.asked is not None]
        prompts = iter(self._tokens([part.asked for part in asked], asked, add_generation_prompt=True))
        if self.responses is not None and parts[0].form == "messages":
            wholes = self.responses.label(rows, self.tokenizer, places)
        else:
            wholes = self._tokens([part.whole for part in parts], parts, markers=self.assistant_only_loss)
        made = []
        for part, whole in zip(parts, wholes, strict=True):
            row = TokenizedRow(whole["input_ids"], list(whole.get("labels", whole["input_ids"])))
            if part.asked is not None:
                row = self._answering(row, part, next(prompts)["input_ids"])
            if "assistant_masks" in whole:
                row = replace(row, labels=marked(row.labels, whole["assistant_masks"]))
            row = _checked(row, part)
            made.append(self._open(row, part) if part.row.get(UNFINISHED) else row)
        return made

    def _parts(self, row: Row, place: str) -> _Parts:
        if "prompt" in row and "completion" in row:
            prompt, answer = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                reference = answer.removesuffix(self.tokenizer.eos_token)
                return _Parts(row, place, "prompt+completion", prompt + self._ended(answer), prompt, reference)
            reference = "\n".join(message["content"] for message in answer)
            parts = _Parts(row, place, "conversation pair", prompt + answer, prompt, reference)
        elif "messages" in row:
            *before, last = row["messages"]
            is_asked = self.prompts and before and last["role"] == "assistant"
            asked = (before, last["content"]) if is_asked else ()
            parts = _Parts(row, place, "messages", row["messages"], *asked)
        elif "text" in row:
            return _Parts(row, place, "text", self._ended(row["text"]))
        else:
            raise UserError(
                f"{place} has the columns {', '.join(sorted(row)) or 'none'}: it needs prompt and completion, "
                "messages, or text (rename columns with the source's `columns`)."
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"{place} is a conversation, but the tokenizer has no chat template: set tokenizer.chat_template.")
        return parts

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def _tokens(self, texts: list[Any], parts: Sequence[_Parts], **how: bool) -> list[dict[str, Any]]:
        """``input_ids``, and with ``markers=True`` the ``assistant_masks``, of texts or of conversations of some rows."""
        if texts and isinstance(texts[0], str):
            return [{"input_ids": ids} for ids in self.tokenizer(text=texts)["input_ids"]]
        places, options = [part.place for part in parts], [template_options(part.row) for part in parts]
        return render_all(self.tokenizer, texts, places, options, template=self.chat_template, **how)

    def _answering(self, made: TokenizedRow, parts: _Parts, prompt_ids: list[int]) -> TokenizedRow:
        """The row with its prompt, and if that carries no loss, without labels there."""
        from trl.data_utils import common_prefix_length

        ids, start = made.input_ids, common_prefix_length(prompt_ids, made.input_ids)
        differs = start < len(prompt_ids)
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id and start == len(prompt_ids) - 1:
            # a tokenizer that ends every text with EOS: at inference the answer would start after the end
            prompt_ids, differs = prompt_ids[:-1], False
        labels = made.labels if parts.form == "messages" else [IGNORE_INDEX] * start + ids[start:]
        reference = parts.reference.strip()
        return TokenizedRow(ids, labels, prompt_ids, _shown(parts.asked), reference, boundary_differs=differs)

    def _open(self, made: TokenizedRow, parts: _Parts) -> TokenizedRow:
        """A row whose answer was cut: what stands behind its last word carries no loss, for its model did not write it."""
        from trl.data_utils import common_prefix_length

        ids, end = made.input_ids, len(made.input_ids)
        if not isinstance(parts.whole, str):
            template = self.responses.template if parts.form == "messages" and self.responses else self.chat_template
            options = {**template_options(parts.row), "continue_final_message": True}
            begun = render(self.tokenizer, parts.whole, parts.place, template=template, options=options)
            end = common_prefix_length(begun["input_ids"], ids)
        while end and ids[end - 1] == self.tokenizer.eos_token_id:  # some tokenizers add one to every text
            end -= 1
        return replace(made, labels=made.labels[:end] + [IGNORE_INDEX] * (len(ids) - end))


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


def _shown(asked: str | Sequence[Row]) -> str:
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return str(asked[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in asked)


def _checked(made: TokenizedRow, parts: _Parts) -> TokenizedRow:
    """The row with its answer."""
    if all(label == IGNORE_INDEX for label in made.labels[1:]):
        raise UserError(f"{parts.place} has no token to predict: its answer is empty. Remove the row.")
    answer = str(parts.row["answer"]).strip() if "answer" in parts.row else None
    if answer == "":
        raise UserError(
            f"{parts.place}: its answer is empty, and would be found in every generated text. Fill it or remove the column."
        )
    return replace(made, answer=answer)
