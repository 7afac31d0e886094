"""What a row is: its four forms, its checks, and the data set that checked rows become.

====================  ===============================================================================================
text                  ``text``: a string
prompt+completion     ``prompt`` and ``completion``: both strings
conversation pair     ``prompt`` and ``completion``: both lists of messages
messages              ``messages``: a list of ``{role, content}``
====================  ===============================================================================================

A row may also carry ``answer`` (a string), ``tools`` (a list), ``chat_template_kwargs`` (a mapping) and ``teacher_prompt``
(a string, or messages: what a teacher sees in place of the prompt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value
from datasets.table import InMemoryTable

from daekit.errors import UserError

RowForm = Literal["messages", "prompt+completion", "conversation pair", "text"]

FORM_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
EXTRA_COLUMNS = ("answer", "tools", "chat_template_kwargs", "teacher_prompt")
COLUMNS = (*(column for columns in FORM_COLUMNS.values() for column in columns), *EXTRA_COLUMNS)
# Of rows that a model has written: true where its answer was cut. Read only where ``columns`` name it.
UNFINISHED = "unfinished"
_NAMED = re.compile(r"\{([^{}]+)\}")  # in a value of ``columns``
VISION_COLUMNS = ("image", "images", "pixel_values")

# Arrow's plain string columns hold 2 GiB.
STRING = Value("large_string")
PLAIN_MESSAGES = List({"role": STRING, "content": STRING})
# Messages with tool calls and the like: an Arrow struct would give every message the keys of all others, set to None.
JSON_MESSAGES = List(Json())


class RowError(Exception):
    """What is wrong with a row, in words that follow its place."""


def form_of(dataset: Dataset) -> RowForm:
    """The form of the rows of a data set that `RowCollector` made."""
    if "messages" in dataset.column_names:
        return "messages"
    if "text" in dataset.column_names:
        return "text"
    return "prompt+completion" if isinstance(dataset.features["prompt"], Value) else "conversation pair"


def take(dataset: Dataset, indices: np.ndarray) -> Dataset:
    """Rows by index, as a new table in memory: reading through the index mapping of `Dataset.select` costs 25 us a row."""
    table = dataset.with_format("arrow")[:]
    return Dataset(InMemoryTable(table.take(pa.array(indices))), info=dataset.info)


class RowCollector:
    """Checks rows one by one and makes them a data set of one form.

    Args:
        source: begins every error message.
        columns: our column name -> its name in the data, or a text with names in braces.
        chat: make messages of prompts and completions that are strings.
    """

    def __init__(self, source: str, columns: Mapping[Any, str], chat: bool = False) -> None:
        self._source = source
        self._renamed = columns
        self._chat = chat
        self._wanted = [(column, columns.get(column, column)) for column in COLUMNS]
        self._wanted += [(UNFINISHED, columns[UNFINISHED])] if UNFINISHED in columns else []
        named = [form for form, needed in FORM_COLUMNS.items() if any(column in columns for column in needed)]
        self._forms = named if len(named) == 1 else list(FORM_COLUMNS)
        self._first: tuple[RowForm, str] | None = None
        self._plain = True
        self._columns: dict[str, list[Any]] = {column: [] for column, _ in self._wanted}

    def __len__(self) -> int:
        return len(self._columns["text"])

    def add(self, row: Mapping[str, Any], place: str) -> None:
        """Check one row and keep it; UserError names the source and ``place``."""
        try:
            form, kept = self._check(row)
            if self._first is None:
                self._first = (form, place)
            elif form != self._first[0]:
                raise RowError(f"is {form}, but {self._first[1]} is {self._first[0]}; a source holds rows of one form")
        except RowError as error:
            raise UserError(f"{self._source}: {place} {error}") from None
        for column, values in self._columns.items():
            values.append(kept.get(column))

    def dataset(self, domain: str) -> Dataset:
        """The rows so far, in order, with a ``domain`` column."""
        assert self._first is not None, "there are rows"
        columns = {name: values for name, values in self._columns.items() if any(value is not None for value in values)}
        if "teacher_prompt" in self._renamed and "teacher_prompt" not in columns:
            raise UserError(f"{self._source}: columns.teacher_prompt: no row has {self._renamed['teacher_prompt']!r}")
        if "chat_template_kwargs" in columns:  # TRL unpacks it: None would raise
            columns["chat_template_kwargs"] = [value or {} for value in columns["chat_template_kwargs"]]
        columns["domain"] = [domain] * len(self)
        said: Any = STRING
        if self._first[0] in ("messages", "conversation pair"):
            said = PLAIN_MESSAGES if self._plain else JSON_MESSAGES
        types = dict.fromkeys(COLUMNS[:4], said) | {"answer": STRING, "tools": Json(), "chat_template_kwargs": Json()}
        types |= {"domain": STRING, UNFINISHED: Value("bool"), "teacher_prompt": said}
        features = Features({name: type_ for name, type_ in types.items() if name in columns})
        if Json() in features.values() or not self._plain:
            return Dataset.from_dict(columns, features=features)
        # Without the per-value encoding of from_dict, which takes longer than all the rest.
        return Dataset(InMemoryTable(pa.table({name: columns[name] for name in features}, schema=features.arrow_schema)))

    def _check(self, row: Mapping[str, Any]) -> tuple[RowForm, dict[str, Any]]:
        values = {ours: value for ours, theirs in self._wanted if (value := value_of(row, theirs)) is not None}
        for column in VISION_COLUMNS:
            if row.get(column) is not None:
                raise RowError(f"has {column!r}: vision rows cannot be distilled here; remove them or the column")
        needed = self._needed(values, row)
        kept = {column: values[column] for column in needed}
        are_lists = {isinstance(value, list) for value in kept.values()}
        form: RowForm
        if needed == ("messages",) or (needed == ("prompt", "completion") and are_lists == {True}):
            kept = {column: self._messages(column, value) for column, value in kept.items()}
            form = "messages" if needed == ("messages",) else "conversation pair"
        else:
            if len(are_lists) > 1:
                raise RowError(
                    "has one of prompt and completion as a list of messages and the other not; both must be of one kind"
                )
            for column, value in kept.items():
                _check_string(column, value)
            form = "text" if needed == ("text",) else "prompt+completion"
            if self._chat and form == "text":
                raise RowError("is text; chat: true makes messages of prompt and completion only")
            if self._chat:
                roles = {"prompt": "user", "completion": "assistant"}
                kept = {column: [{"role": roles[column], "content": value}] for column, value in kept.items()}
                form = "conversation pair"
        kept |= _check_extras(values)
        if "teacher_prompt" in values:
            kept["teacher_prompt"] = self._teacher_prompt(values["teacher_prompt"], form)
        return form, kept

    def _teacher_prompt(self, value: Any, form: RowForm) -> Any:
        """As the prompt of that form is: a text, or messages."""
        if form == "text":
            raise RowError("is text with a teacher_prompt, which stands in place of a prompt; give prompt and completion")
        if isinstance(value, list) and form != "prompt+completion":
            return self._messages("teacher_prompt", value)
        if isinstance(value, list):
            raise RowError("has messages as teacher_prompt and a text as prompt; both must be of one kind (or set chat: true)")
        _check_string("teacher_prompt", value)
        return value if form == "prompt+completion" else [{"role": "user", "content": value}]

    def _needed(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
        complete = [FORM_COLUMNS[form] for form in self._forms if values.keys() >= set(FORM_COLUMNS[form])]
        if len(complete) == 1:
            return complete[0]
        if complete:
            forms = " and ".join("/".join(columns) for columns in complete)
            name = complete[0][0]
            raise RowError(f"has {forms}; say which to use with columns, such as columns: {{{name}: {name}}}")
        filled = [name for name, value in row.items() if value is not None]
        empty = [name for name, value in row.items() if value is None]
        has = "has " + (", ".join(map(repr, filled)) or "no values")
        if empty:
            has += f" (and null in {', '.join(map(repr, empty))})"
        needs = ", or ".join(
            " and ".join(f"{self._renamed.get(column, column)!r}" for column in FORM_COLUMNS[form]) for form in self._forms
        )
        raise RowError(f"needs {needs}, but {has}; other names are given with columns, such as columns: {{prompt: question}}")

    def _messages(self, column: str, value: Any) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not value:
            raise RowError(f"has {column} that is {_shown(value)}, not a list of messages {{role, content}}")
        messages = [_check_message(column, index, message) for index, message in enumerate(value)]
        self._plain = self._plain and all(len(message) == 2 for message in messages)
        return messages


def value_of(row: Mapping[str, Any], theirs: str) -> Any:
    """The value of a column, or a text with the values of the columns that it names in braces; None where one is missing."""
    names = _NAMED.findall(theirs) if "{" in theirs else []
    if not names:
        return row.get(theirs)
    values: dict[str, Any] = {name: row.get(name) for name in names}
    if None in values.values():
        return None
    for name, value in values.items():
        if not isinstance(value, str):
            raise RowError(f"has {_shown(value)} as {name}, which columns sets into a text; it must be a string")
    return _NAMED.sub(lambda found: values[found[1]], theirs)


def _check_message(column: str, index: int, message: Any) -> Mapping[str, Any]:
    if isinstance(message, dict) and message.keys() == {"role", "content"}:  # nearly all: be quick about them
        role, content = message["role"], message["content"]
        if isinstance(role, str) and role and isinstance(content, str) and content.strip():
            if not (role.isascii() and content.isascii()):
                _check_characters(f"{column}[{index}]", role + content)
            return message
    name = f"{column}[{index}]"
    if not isinstance(message, Mapping) or "role" not in message:
        has = f"the keys {', '.join(map(repr, message))}" if isinstance(message, Mapping) else _shown(message)
        raise RowError(f"has {has} in {name}, which needs role and content")
    kept = {key: value for key, value in message.items() if value is not None}
    role, content = kept.get("role"), kept.get("content", "")
    if not isinstance(role, str) or not role:
        raise RowError(f"has {_shown(role)} as role of {name}, which must be a string")
    if isinstance(content, list):
        raise RowError(f"has a list as content of {name} (the form of vision data); content must be a string")
    if not isinstance(content, str):
        raise RowError(f"has {_shown(content)} as content of {name}, which must be a string")
    # Data sets give system messages and calls of tools an empty content on purpose; a turn without words is a defect.
    if role in ("user", "assistant") and not content.strip() and not kept.get("tool_calls"):
        raise RowError(f"has an empty content in {name} (role {role}); remove the row")
    _check_characters(name, kept)
    return kept | {"content": content}


def _check_string(column: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"has {_shown(value)} as {column}, which must be a string")
    if not value.strip():
        raise RowError(f"has an empty {column}; remove the row")
    _check_characters(column, value)


def _check_characters(name: str, value: Any) -> None:
    """Half a surrogate pair is no character: neither Arrow nor a tokenizer can take it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"has {text[error.start]!a} in {name}, half of a surrogate pair, which is no character; mend the text"
        ) from None


def _check_extras(values: Mapping[str, Any]) -> dict[str, Any]:
    extras = {column: values[column] for column in ("answer", "tools", "chat_template_kwargs", UNFINISHED) if column in values}
    if "answer" in extras:
        _check_string("answer", extras["answer"])
    if isinstance(extras.get("tools"), str):
        try:
            extras["tools"] = json.loads(extras["tools"])
        except (ValueError, RecursionError) as error:
            raise RowError(f"has tools that are not JSON ({error})") from None
    kinds: tuple[tuple[str, Any, str], ...] = (("tools", list, "a list"), ("chat_template_kwargs", Mapping, "a mapping"))
    for column, kind, wanted in kinds:
        if column in extras:
            if not isinstance(extras[column], kind):
                raise RowError(f"has {_shown(extras[column])} as {column}, which must be {wanted}")
            _check_characters(column, extras[column])
    return extras


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
