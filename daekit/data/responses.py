"""Which tokens of a conversation are the response: those that carry loss in ``messages`` rows unless a config says otherwise.

TRL's default trains on the system's and the user's tokens, too; in DAE the divergence would then cover the prompts. Here the
response alone counts: what the generation markers of the chat template enclose (TRL has such templates for the common
families), or, where a template has none, the last assistant turn, found by comparing tokens.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError, first_line
from daekit.protocol import IGNORE_INDEX

ROWS_AT_ONCE = 256  # fast tokenizers take many texts in one call in a third of the time
SECONDS_PER_ROW = 5.0  # of CPU time to render a conversation, which takes less than a millisecond
_Tokens = dict[str, list[int]]  # input_ids and, where they are asked for, assistant_masks


@dataclass(frozen=True)
class ResponseLabels:
    """Tokenises a conversation and labels its response.

    Attributes:
        markers: whether generation markers tell the response, of all assistant turns; else it is the last assistant turn.
        template: chat template to render with; None: the tokenizer's own.
    """

    markers: bool
    template: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ResponseLabels:
        """The way that fits the tokenizer's chat template.

        Raises:
            UserError: a tokenizer without chat template.
        """
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if tokenizer.chat_template is None:
            raise UserError(
                "tokenizer.chat_template is missing, so conversations cannot be tokenised: set it, or give rows of prompt and "
                "completion"
            )
        if has_generation_markers(tokenizer.chat_template):
            return cls(markers=True)
        try:
            with cpu_limit(SECONDS_PER_ROW):  # TRL tries the template out
                template = get_training_chat_template(tokenizer)
        except TimeoutError as error:
            raise _endless("tokenizer", error) from error
        except Exception:  # TRL knows no template with markers for this one, or it fails on what TRL tries
            return cls(markers=False)
        return cls(markers=template is not None, template=template)

    @property
    def description(self) -> str:
        """Which tokens carry loss, in words."""
        if not self.markers:
            return "the last assistant turn of each row (the chat template has no generation markers)"
        whose = "the chat template" if self.template is None else "TRL's training template for this chat template"
        return f"all assistant turns, as the generation markers of {whose} enclose them"

    def label(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, places: Sequence[str]
    ) -> list[dict[str, list[int]]]:
        """``input_ids`` and ``labels`` (-100 on all tokens but the response) of rows with ``messages``.

        Args:
            rows: Rows, which may have ``tools`` and ``chat_template_kwargs``, as in TRL.
            tokenizer: Tokenizer of the model that is trained or evaluated.
            places: Names of the rows in errors.

        Raises:
            UserError: a row that the template refuses, without an assistant turn, or whose response cannot be told exactly.
        """
        conversations = [row["messages"] for row in rows]
        rendered = partial(render_all, tokenizer, places=places, template=self.template, options=[*map(template_options, rows)])
        wholes = rendered(conversations, markers=self.markers)
        if self.markers:
            masks: list[Any] = [whole["assistant_masks"] for whole in wholes]
        else:  # what the last assistant turn adds to the conversation before it
            turns = list(map(_last_turn, conversations, places))
            prompts = [each[:turn] for each, turn in zip(conversations, turns, strict=True)]
            untils = [each[: turn + 1] for each, turn in zip(conversations, turns, strict=True)]
            before = rendered(prompts, add_generation_prompt=True)
            # with nothing behind the last turn, as in nearly all rows, the whole is rendered already
            masks = list(map(_last_mask, before, wholes if untils == conversations else rendered(untils), wholes, places))
        made = []
        for messages, whole, mask, place in zip(conversations, wholes, masks, places, strict=True):
            if self.markers:
                _require_apart(messages, mask, place)
            if not any(mask):
                raise _without_tokens(place)
            made.append({"input_ids": whole["input_ids"], "labels": marked(whole["input_ids"], mask)})
        return made


def marked(labels: Sequence[int], mask: Sequence[Any]) -> list[int]:
    """Labels that stay where the mask is set."""
    return [label if here else IGNORE_INDEX for label, here in zip(labels, mask, strict=True)]


def _without_tokens(place: str) -> UserError:
    return UserError(f"{place}: has no assistant tokens, so nothing carries loss; remove the row, or mend its roles")


def _last_turn(messages: Sequence[Mapping[str, Any]], where: str) -> int:
    """Which message of a conversation is its last assistant turn; UserError if there is none, or nothing before it."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise _without_tokens(where)
    if turns[-1] == 0:
        raise UserError(f"{where}: begins with its only assistant turn, so nothing asks for it; remove the row, or mend it")
    return turns[-1]


def _last_mask(prompt: _Tokens, until: _Tokens, whole: _Tokens, where: str) -> list[bool]:
    """Which tokens of a conversation are in ``until``, with its last assistant turn, and not in ``prompt``, before it."""
    before, with_turn, ids = (each["input_ids"] for each in (prompt, until, whole))
    if with_turn[: len(before)] != before or ids[: len(with_turn)] != with_turn:
        raise UserError(
            f"{where}: the tokens before its last assistant turn are others with the turn than without it, so the "
            "response cannot be told exactly. Set tokenizer.chat_template to a template with {% generation %} markers, "
            "give rows of prompt and completion, or set assistant_only_loss to false to train on all tokens."
        )
    return [len(before) <= place < len(with_turn) for place in range(len(ids))]


def _require_apart(messages: list[Any], mask: list[int], where: str) -> None:
    """Every assistant turn that stands between other turns must be one marked piece of the tokens.

    transformers looks up the tokens of a marked text by its first and last character. Where the tokenizer drops that character
    (white space at the end), its mask runs on to the end of the row: over the user's words.

    Raises:
        UserError: fewer pieces than assistant turns.
    """
    assistant = [message["role"] == "assistant" and bool(message.get("content")) for message in messages]
    turns, pieces = (sum(is_marked for is_marked, _ in groupby(map(bool, each))) for each in (assistant, mask))
    if pieces < turns:
        raise UserError(
            f"{where}: its {turns} assistant turns are {pieces} marked pieces of its tokens, so what carries loss cannot be "
            "told: the tokenizer drops white space at the edge of a {% generation %} block, or the template marks some turns "
            "only. Mend tokenizer.chat_template, give rows of prompt and completion, or set assistant_only_loss to false."
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Any],
    where: str,
    *,
    template: str | None = None,
    options: Mapping[str, Any],
    markers: bool = False,
    add_generation_prompt: bool = False,
) -> _Tokens:
    """The tokens of one conversation: ``input_ids``, and with ``markers`` the ``assistant_masks`` of the template's markers.

    Args:
        where: what errors call the row.
        template: chat template to render with; None: the tokenizer's own.
        options: ``tools`` and the template's own variables.

    Raises:
        UserError: the template refuses the conversation, or does not come to an end.
    """
    how = {"chat_template": template, "return_assistant_tokens_mask": markers, "add_generation_prompt": add_generation_prompt}
    try:
        with cpu_limit(SECONDS_PER_ROW):
            return tokenizer.apply_chat_template(messages, return_dict=True, **how, **options)
    except TimeoutError as error:
        raise _endless(where, error) from error
    except Exception as error:  # a template is a program: it raises what its author wrote, or did not think of
        roles = ", ".join(dict.fromkeys(str(each.get("role")) for each in messages))
        with_tools = ", with tools" if options.get("tools") else ""
        raise UserError(
            f"{where}: tokenizer.chat_template refuses the conversation ({first_line(error)}); its roles are {roles}"
            f"{with_tools}. Mend the row, or set another template."
        ) from error


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Any]],
    places: Sequence[str],
    options: Sequence[Mapping[str, Any]],
    **how: Any,
) -> list[_Tokens]:
    """``render`` of many conversations, in one call where their options are equal: a fast tokenizer takes a third of the time.

    Where that call fails they are rendered one by one, so that the error names the row.
    """
    if len(conversations) > 1 and all(each == options[0] for each in options):
        try:
            together = render(tokenizer, list(conversations), places[0], options=options[0], **how)
            return [dict(zip(together, each, strict=True)) for each in zip(*together.values(), strict=True)]
        except Exception:  # of one row, or so many long ones that they take longer than one may: told, or done, one by one
            pass
    each_row = zip(conversations, places, options, strict=True)
    return [render(tokenizer, each, place, options=its, **how) for each, place, its in each_row]


def _endless(where: str, error: TimeoutError) -> UserError:
    return UserError(f"{where}: tokenizer.chat_template does not come to an end ({error}). Set another template.")


def require_markers(tokenizer: PreTrainedTokenizerBase) -> ResponseLabels:
    """How ``assistant_only_loss=True`` is kept; UserError where TRL knows no generation markers for the chat template."""
    labels = ResponseLabels.of(tokenizer)
    if not labels.markers:
        raise UserError(
            "assistant_only_loss=True: tokenizer.chat_template has no {% generation %} markers, and TRL knows no template with "
            "them for it. Set a template that has them, or leave assistant_only_loss unset: the last turn counts then."
        )
    return labels


def label_responses(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: ResponseLabels,
    name: str,
    processes: int | None = None,
) -> Dataset | IterableDataset:
    """Add ``input_ids`` and ``labels`` to rows of ``messages`` (or ``conversations``, which are converted as TRL does).

    Args:
        dataset: The rows; those of a stream are tokenised when they come by.
        tokenizer: The student's tokenizer.
        labels: How the response is told.
        name: Name of the data set in errors.
        processes: Number of processes of ``datasets.map``; None: this one alone.
    """
    from trl.data_utils import maybe_convert_to_chatml

    def tokenise(columns: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        places = [f"the {name} data set, row {index}" for index in indices]
        made = labels.label(list(map(maybe_convert_to_chatml, rows)), tokenizer, places)
        return {key: [each[key] for each in made] for key in ("input_ids", "labels")}

    how: dict[str, Any] = {"with_indices": True, "batched": True}
    if isinstance(dataset, IterableDataset):
        return dataset.map(tokenise, batch_size=1, **how)  # a stream is read no further than it must be
    return dataset.map(tokenise, batch_size=ROWS_AT_ONCE, num_proc=processes, desc=f"Tokenizing {name} dataset", **how)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template beside the messages: ``tools`` and ``chat_template_kwargs``, as in TRL."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Run the block, a chat template that can loop for as long as it likes, under a limit of CPU time; in the main thread only.

    Args:
        seconds: CPU time that the process may use within the block.

    Raises:
        TimeoutError: the block has used more.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
