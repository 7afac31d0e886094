"""What becomes of rows that are too long or hold nothing to learn: counted per domain, never without a word.

TRL's preparation cuts at ``max_length`` and then drops rows whose response was cut away, both silently. Here its tokenised
rows are measured first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, first_loss, is_told_more, last_response
from daekit.protocol import IGNORE_INDEX

OVERLONG = ("error", "truncate", "drop")
_NO_LIMIT = np.iinfo(np.int64).max // 2
_SHOWN = 24  # tokens of the longest row
_AS_IT_IS = np.iinfo(np.int32).min  # in place of a number of tokens, of a row whose teacher is not told more
_FATES = {
    "truncated": "cut at max_length={}",
    "dropped": "left out, for it is longer than max_length={}",
    "emptied": "left out, for it loses its whole response at max_length={}",
    "blank": "left out, for it has nothing to predict",
}
_STAY = ("", "truncated")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainCount:
    """What preparation did to the rows of one domain.

    Attributes:
        rows: rows that are trained on.
        loss_tokens: tokens of those rows that have a loss.
        truncated: rows that were cut at ``max_length``.
        dropped: rows left out because they were longer (``overlong: drop``).
        crowded: rows left out because their prompt leaves no room for what the student writes (``overlong: drop``).
        emptied: rows left out because the cut took their whole response.
        blank: rows left out because they had nothing to predict to begin with.
    """

    rows: int
    loss_tokens: int
    truncated: int
    dropped: int
    crowded: int
    emptied: int
    blank: int


def fit_to_length(
    dataset: Dataset,
    max_length: int | None,
    overlong: str,
    name: str,
    teacher_max_length: int | None = None,
    max_new_tokens: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, dict[str, DomainCount]]:
    """Apply the policy for overlong rows to tokenised rows (``input_ids``, ``labels``, ``domain``) and count.

    A row with ``teacher_prompt_ids`` is too long where either side is; what is cut is the end of the response, on both sides.

    Args:
        dataset: The rows.
        max_length: Most tokens of a row; None: any.
        overlong: ``error``, ``truncate`` or ``drop``.
        name: Name of the data set, for errors.
        teacher_max_length: Most tokens that a teacher sees of a row with ``teacher_prompt_ids``; None: ``max_length``.
        max_new_tokens: Tokens that the student may write behind a prompt. A row whose prompt leaves less is left out with
            ``drop``; whoever writes refuses it otherwise.
        tokenizer: It shows how the longest row begins, for shuffled rows have lost their places in the user's files.

    Raises:
        UserError: a row that is too long when ``overlong`` is ``error``; a domain that loses all its rows.
    """
    limit = _NO_LIMIT if max_length is None else max_length
    teacher_limit = limit if teacher_max_length is None else teacher_max_length
    more = _told_more(dataset)
    limits = np.where(more == _AS_IT_IS, limit, np.minimum(limit, teacher_limit - more))  # of the student's tokens
    lengths, loss, loss_within = _measure(dataset, limits)
    domains = np.asarray(dataset["domain"], dtype=object)
    long = lengths > limits
    if overlong == "error" and long.any():
        over, what = lengths > limit, f"max_length={limit} tokens"
        if not over.any():
            over, lengths = long, np.where(long, lengths + more, 0)
            what = f"teacher_max_length={teacher_limit} (default: max_length) tokens with their teacher_prompt"
        raise _overlong(dataset, lengths, over, what, name, tokenizer)
    fates = _fates(loss > 0, long, loss_within > 0, overlong)
    if overlong == "drop" and max_new_tokens:
        fit = np.flatnonzero(fates == "")
        labels = dataset.select(fit).select_columns("labels").with_format("numpy")
        prompts = np.array([last_response(row["labels"]) for row in labels])
        fates[fit[prompts > limits[fit] - max_new_tokens]] = "crowded"
    stay = np.isin(fates, _STAY)
    counts = {}
    for domain in dict.fromkeys(domains):
        mine = domains == domain
        of = Counter(fates[mine].tolist())
        found = {fate: of[fate] for fate in ("truncated", "dropped", "crowded", "emptied", "blank")}
        counts[domain] = DomainCount(int((stay & mine).sum()), int(loss_within[stay & mine].sum()), **found)
        if counts[domain].rows == 0:
            raise _nothing_left(name, domain, of.total(), counts[domain], max_length, max_new_tokens)
    if not stay.all():
        dataset = dataset.select(np.flatnonzero(stay))
    if "truncated" in fates:
        kept = limits[stay].tolist()
        dataset = dataset.map(lambda row, at: _cut(row, kept[at]), with_indices=True, desc=f"Truncating {name} dataset")
    return dataset, counts


def fit_stream_to_length(dataset: IterableDataset, max_length: int | None, overlong: str, name: str) -> IterableDataset:
    """The same policy for a stream: a row that is too long, or left out, is named when it comes by.

    Only the first one of each kind and domain (in each process that reads) is a warning. They are not counted: SFTTrainer
    peeks at the first rows, packing reads the stream once per domain, and ranks and workers each read for themselves.
    """
    limit = _NO_LIMIT if max_length is None else max_length
    told: set[tuple[str, str]] = set()

    def stays(row: dict[str, Any], index: int) -> bool:
        place = f"the {name} stream, row {index} (domain {row['domain']!r}): "
        long = len(row["input_ids"]) > limit
        if long and overlong == "error":
            raise UserError(
                f"{place}{len(row['input_ids'])} tokens, more than max_length={max_length}. "
                "Raise max_length, or set overlong to 'truncate' or 'drop'."
            )
        if not long and _predicts(row["labels"]):
            return True
        fate = str(_fates(_predicts(row["labels"]), long, _predicts(row["labels"][:limit]), overlong))
        if fate and (row["domain"], fate) not in told:
            told.add((row["domain"], fate))
            logger.warning("%s%s; further such rows of this domain are not named", place, _FATES[fate].format(max_length))
        return fate in _STAY

    dataset = dataset.filter(stays, with_indices=True)
    return dataset.map(lambda row: _cut(row, limit)) if overlong == "truncate" else dataset


def _fates(predicts: Any, long: Any, predicts_within: Any, overlong: str) -> np.ndarray:
    """What becomes of rows, in the words of ``DomainCount``; empty: they stay as they are.

    Args:
        predicts: Whether a row has a token to predict; ``predicts_within``: within its limit.
        long: Whether it is longer than its limit.
    """
    conditions = [np.logical_not(predicts), np.logical_not(long), np.array(overlong == "drop"), predicts_within]
    return np.select(conditions, ["blank", "", "dropped", "truncated"], "emptied")


def _told_more(dataset: Dataset) -> np.ndarray:
    """Per row: by how many tokens the teacher sees more of it than the student; a large negative number without a prompt."""
    more = np.full(len(dataset), _AS_IT_IS, dtype=np.int64)
    if TEACHER_PROMPT_IDS in dataset.column_names:
        for place, row in enumerate(dataset.select_columns(["labels", TEACHER_PROMPT_IDS]).with_format("numpy")):
            if is_told_more(row):
                more[place] = len(row[TEACHER_PROMPT_IDS]) - first_loss(row["labels"])
    return more


def _measure(dataset: Dataset, limits: np.ndarray) -> list[np.ndarray]:
    """Per row: length in tokens, tokens with a loss, and those of them within the first tokens that ``limits`` allows."""
    parts = []
    done = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        sizes = pc.list_value_length(table["labels"]).to_numpy()
        rows = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        # the first token of a row is predicted by nothing
        loss = (pc.list_flatten(table["labels"]).to_numpy() != IGNORE_INDEX) & (place > 0)
        within = loss & (place < limits[done + rows])
        done += len(sizes)
        counts = (np.bincount(rows[each], minlength=len(sizes)) for each in (loss, within))
        parts.append((pc.list_value_length(table["input_ids"]).to_numpy(), *counts))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _overlong(
    dataset: Dataset, lengths: np.ndarray, long: np.ndarray, limit: str, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> UserError:
    """The error for rows that are too long; it shows how the longest begins."""
    per_domain = Counter(dataset.select(np.flatnonzero(long))["domain"])
    worst, begins = int(lengths.argmax()), ""
    if tokenizer is not None:
        begins = f": {' '.join(str(tokenizer.decode(dataset[worst]['input_ids'][:_SHOWN])).split())!r}..."
    return UserError(
        f"the {name} data set: {int(long.sum())} of {len(lengths)} rows have more than {limit} "
        f"({', '.join(f'{domain}: {rows}' for domain, rows in per_domain.items())}; the longest is row {worst} with "
        f"{int(lengths[worst])}{begins}). "
        f"Raise {limit.split('=')[0]}, or set overlong to 'truncate' or 'drop'."
    )


def _nothing_left(
    name: str, domain: str, rows: int, count: DomainCount, max_length: int | None, max_new_tokens: int
) -> UserError:
    room = f"{count.crowded} leave no room for max_new_tokens={max_new_tokens}, " if count.crowded else ""
    return UserError(
        f"the {name} data set: domain {domain!r} loses all its {rows} rows ({count.blank} have nothing to predict, "
        f"{count.dropped} are longer than max_length={max_length}, {room}{count.emptied} lose their whole response at "
        f"max_length={max_length}). Raise max_length or mend the rows."
    )


def _cut(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    return {"input_ids": row["input_ids"][:limit], "labels": row["labels"][:limit]}


def _predicts(labels: list[int]) -> bool:
    return any(label != IGNORE_INDEX for label in labels[1:])
