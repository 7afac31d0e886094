"""Collation that keeps what TRL's collator drops: the domain of each row, and which position belongs to which row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, as_teacher_sees, is_told_more
from daekit.protocol import IGNORE_INDEX, Batch

_ROW, _DOMAINS, EXAMPLES, ON_POLICY, FOR_TEACHER = "row_ids", "domains", "row_examples", "row_on_policy", "for_teacher"
_NOT_OF_THE_MODEL = (_ROW, _DOMAINS, EXAMPLES, ON_POLICY, FOR_TEACHER, "labels")
_BESIDE = ("domain", TEACHER_PROMPT_IDS)  # columns that are no tokens of the row


class DomainCollator:
    """Wraps a collator (TRL's, or a user's) and adds ``row_ids [B,T]``, ``domains`` and ``row_examples``, one per row.

    A packed example is several rows of one domain; ``seq_lengths`` says where they end. Where a row has tokens for its teacher
    alone, ``for_teacher`` is the batch once more as teachers see it.

    Args:
        inner: makes ``input_ids``, ``labels`` and either ``attention_mask`` (padded) or ``position_ids`` (flattened).
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate; the result holds tensors and the tuple of domain names, one per row."""
        batch = self._collated(examples)
        if any(map(is_told_more, examples)):
            seen = [{**each, **as_teacher_sees(each)} if is_told_more(each) else each for each in examples]
            batch[FOR_TEACHER] = self._collated(seen)
        return batch

    def _collated(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        domains = [example["domain"] for example in examples]
        batch = self.inner([{key: value for key, value in example.items() if key not in _BESIDE} for example in examples])
        if "labels" not in batch:
            raise UserError("the data collator returned no labels; the loss is defined by labels (-100: not trained on)")
        batch[EXAMPLES] = tuple(range(len(examples)))
        if "attention_mask" in batch:
            size = batch["labels"].shape[0]
            rows = torch.arange(size)[:, None].expand_as(batch["labels"])
            batch[_ROW] = torch.where(batch["attention_mask"] != 0, rows, -1)
        else:
            lengths = [example.get("seq_lengths") or [len(example["input_ids"])] for example in examples]
            batch[EXAMPLES] = tuple(example for example, parts in enumerate(lengths) for _ in parts)
            domains = [domains[example] for example in batch[EXAMPLES]]
            batch[_ROW] = _flattened_rows([length for parts in lengths for length in parts], batch["labels"].shape[1])
        batch[_DOMAINS] = tuple(domains)
        batch["labels"] = _without_first_tokens(batch["labels"], batch[_ROW])
        return batch


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """The Batch of a collated dictionary: everything else in it goes to the model's forward."""
    forward = {key: value for key, value in inputs.items() if key not in _NOT_OF_THE_MODEL}
    written = tuple(inputs.get(ON_POLICY, ()))
    for_teacher = as_batch(inputs[FOR_TEACHER]) if FOR_TEACHER in inputs else None
    return Batch(forward, inputs["labels"], inputs[_ROW], tuple(inputs[_DOMAINS]), written, for_teacher)


def collated_rows(inputs: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int], str]]:
    """(token ids, labels, domain) of each row of a collated dictionary, without padding."""
    ids_BT, labels_BT, row_BT = (inputs[key].cpu() for key in ("input_ids", "labels", _ROW))
    for row, domain in enumerate(inputs[_DOMAINS]):
        here_BT = row_BT == row
        yield ids_BT[here_BT].tolist(), labels_BT[here_BT].tolist(), domain


def without_loss(inputs: dict[str, Any], own: int) -> None:
    """Take the loss from the examples of a collated dictionary beyond the first ``own``, and their numbers, which become -1."""
    labels_BT, row_BT = inputs["labels"], inputs[_ROW]
    for row, example in enumerate(inputs[EXAMPLES]):
        if example >= own:
            labels_BT = labels_BT.masked_fill(row_BT == row, IGNORE_INDEX)
    inputs["labels"] = labels_BT
    inputs[EXAMPLES] = tuple(example if example < own else -1 for example in inputs[EXAMPLES])


def _without_first_tokens(labels_BT: Tensor, row_BT: Tensor) -> Tensor:
    """The first token of a row is predicted by nothing: what stands before it is padding (on the left) or another row."""
    starts = torch.ones_like(row_BT, dtype=torch.bool)
    starts[:, 1:] = row_BT[:, 1:] != row_BT[:, :-1]
    return labels_BT.masked_fill(starts, IGNORE_INDEX)


def _flattened_rows(lengths: list[int], total: int) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.cat([rows, torch.full((total - rows.numel(),), -1)])[None]
