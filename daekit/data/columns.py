"""What the columns of a data set must hold: whom each row follows, and something to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from daekit.errors import UserError, listed

_CHATS, _PAIR = ("messages", "conversations"), ("prompt", "completion")
_BESIDE_TOKENS = ("labels", "attention_mask", "completion_mask", "assistant_masks")  # one value per token


def first_row(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a data set; UserError if it has none."""
    for row in dataset:
        return row
    raise UserError(f"the {name} data set is empty: it has no rows")


def require_domains(dataset: Dataset | IterableDataset, name: str, default: str | None) -> Dataset | IterableDataset:
    """Make sure that every row has a domain; ``default`` fills in for a data set without that column.

    Raises:
        UserError: no rows, no ``domain`` column and no default, or a row whose domain is not a name (of a stream: when it
            comes by).
    """
    if "domain" not in first_row(dataset, name):
        if default is None:
            raise UserError(
                f"the {name} data set has no column 'domain': add one that names the domain of each row "
                "(dataset.add_column('domain', [...])), for that decides which teacher it follows"
            )
        if isinstance(dataset, Dataset):
            return dataset.add_column("domain", [default] * len(dataset))
        return dataset.map(lambda row: {"domain": default})

    def check(values: dict[str, Any], row: int) -> dict[str, Any]:
        if not isinstance(values["domain"], str) or not values["domain"]:
            raise UserError(f"the {name} data set, row {row}: domain is {values['domain']!r}, not a name")
        return values

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True, features=dataset.features)
    for row, domain in enumerate(dataset["domain"]):
        check({"domain": domain}, row)
    return dataset


def require_values(dataset: Dataset | IterableDataset, name: str, text_field: str) -> Dataset | IterableDataset:
    """Make sure that every row has what TRL trains on; TRL's own error would name neither row nor column.

    Raises:
        UserError: no columns that TRL trains on; a row with None in one of them, with a value that is no text and no list of
            messages, or with another number of labels than of tokens (of a stream: when it comes by).
    """
    first = first_row(dataset, name)
    forms = [("input_ids",), _PAIR, *((chat,) for chat in _CHATS), (text_field,)]
    plain = [chat for chat in _CHATS if text_field in first and not isinstance(first.get(chat), list)]  # TRL takes the text
    columns = next((form for form in forms if first.keys() >= set(form) and form[0] not in plain), ())
    if not columns:
        raise UserError(
            f"the {name} data set has the columns {listed(map(repr, first))}: none to train on. Name them messages, "
            f"prompt and completion, input_ids or {text_field} (dataset_text_field)"
        )

    def check(values: dict[str, Any], row: int) -> dict[str, Any]:
        _require_row(values, columns, f"the {name} data set, row {row}")
        return values

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True, features=dataset.features)
    check(first, 0)  # the values of a column are of one type
    beside = [key for key in _BESIDE_TOKENS if isinstance(first.get(key), list)] if "input_ids" in columns else []
    start = 0
    for table in dataset.select_columns([*columns, *beside]).with_format("arrow").iter(batch_size=1000):
        nulls = [pc.is_null(table[column]) for column in columns]
        uneven = [pc.not_equal(pc.list_value_length(table[key]), pc.list_value_length(table["input_ids"])) for key in beside]
        for flags in (*nulls, *uneven):
            at = pc.index(flags, pa.scalar(True)).as_py()
            if at >= 0:
                check(dataset[start + at], start + at)
        start += len(table)
    return dataset


def _require_row(values: Mapping[str, Any], columns: tuple[str, ...], place: str) -> None:
    for column in columns:
        value = values[column]
        if value is None:
            raise UserError(f"{place}: {column} is None; fill it in or remove the row")
        chat = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
        if column == "input_ids" or (chat and column in (*_CHATS, *_PAIR)) or (isinstance(value, str) and column not in _CHATS):
            continue
        wanted = "a list of messages" if column in _CHATS else "a text or a list of messages" if column in _PAIR else "a text"
        raise UserError(f"{place}: {column} is {str(value)[:60]!r} ({type(value).__name__}); it must be {wanted}")
    if columns == _PAIR and isinstance(values["prompt"], str) != isinstance(values["completion"], str):
        raise UserError(f"{place}: one of prompt and completion is a text, the other a list of messages; write both alike")
    for key in _BESIDE_TOKENS if "input_ids" in columns else ():
        if isinstance(values.get(key), Sized) and len(values[key]) != len(values["input_ids"]):
            raise UserError(f"{place}: has {len(values['input_ids'])} input_ids, but {len(values[key])} {key}; give as many")
