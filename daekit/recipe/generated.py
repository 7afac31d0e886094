"""Sources whose rows a model writes: who writes them, after which prompts, and which of them are kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from daekit.errors import listed
from daekit.recipe.adapter_config import BARE_BASE, adapter_stage
from daekit.recipe.judge import url_problems
from daekit.recipe.model import ModelSpec, StudentSpec  # noqa: F401 (pydantic looks the names of ModelSpec up here)
from daekit.recipe.reading import Choice, FilePath, Flag, Number, Seed, Spec, Text, Whole
from daekit.recipe.suite import Column, ServedModelSpec, SuiteModelSpec
from daekit.recipe.validation import Problems, missing_rows

_OWN_WORDS = ("self", "bos")
_READING = ("split", "name", "revision", "columns", "chat")
_OF_SELF = ("temperature", "top_p", "max_new_tokens")


class GeneratorSpec(ServedModelSpec, ModelSpec):
    """The model that writes: a path, a hub id, ``stage:NAME``, an adapter on its base, or an endpoint.

    A plain text ``https://HOST/v1#MODEL`` is short for ``{url: ..., served_model: ...}``, any other for a model.
    """

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class."""
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return SuiteModelSpec.expand(value)
        return super().expand(value)

    def problems(self) -> Problems:
        """An endpoint that is a model, too, or neither; a model that has nothing to write."""
        own = self.changed("path", "stage", "config", "adapter", "init")
        if self.url is None:
            yield from super().problems()
            for key in self.changed("served_model", "api_key_env"):
                yield key, "belongs to an endpoint (url)"
            if self.init is not None or self.config is not None:
                yield (), "random weights, or parts of a teacher, have nothing to write; give a path or a stage"
            for key in self.changed("offload", "whole"):
                yield key, "belongs to a teacher in training; use device_map or quantization"
            if self.adapter == BARE_BASE:
                yield "adapter", "the base is a model of its own here; give its path"
            return
        if own:
            yield (), f"is an endpoint (url) or a model ({listed(own)}), not both"
        for sentence in url_problems(self.url):
            yield "url", sentence
        if not self.served_model:
            yield "served_model", "is missing: name the endpoint's model: https://HOST/v1#MODEL"


class PromptsSpec(Spec):
    """What the model answers: prompts of rows, user turns that it writes itself (``self``), or nothing (``bos``).

    ``self`` and ``bos`` are short for ``{written: self}`` and ``{written: bos}``, any other text for ``{path: ...}``.
    """

    NOUN: ClassVar = "self, bos, a path or a mapping"

    written: Annotated[Literal["self", "bos"] | None, Choice] = Field(
        None,
        description="self: the model writes the user's turn, then answers it; bos: it writes a text from its first token on.",
    )
    source: Text | None = Field(None, description="Another source of this recipe, whose training prompts are answered.")
    path: FilePath | None = Field(None, description="A JSONL or Parquet file, a directory of them, or a hub id.")
    split: Text = Field("train", description="Of `path`, as in a source; name, revision, columns, chat and limit likewise.")
    name: Text | None = Field(None, description="Configuration name of a hub data set.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set.")
    columns: dict[Annotated[Column, Choice], Text] = Field({}, description="Our column name -> its name in the data.")
    chat: Flag = Field(False, description="Make a user's message of each prompt that is a string.")
    limit: Whole | None = Field(None, gt=0, description="Use at most so many prompts (the first ones).")
    temperature: Number | None = Field(None, gt=0, description="Of `self`: of the user's turn (default: that of the answer).")
    top_p: Number | None = Field(None, gt=0, le=1, description="Of `self`: of the user's turn (default: that of the answer).")
    max_new_tokens: Whole = Field(
        64, gt=0, description="Of `self`: tokens of the user's turn at most; longer ones are dropped."
    )

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class."""
        return {"written" if value in _OWN_WORDS else "path": value} if isinstance(value, str) else value

    def problems(self) -> Problems:
        """None or several kinds of prompts, and settings of another kind."""
        ways = self.changed("written", "source", "path")
        if len(ways) != 1:
            yield (), f"must be exactly one of self, bos, {{path: ...}} and {{source: ...}}, not {listed(ways)}"
        yield from missing_rows("path", self.path)
        for key in self.changed(*_READING, *(() if self.source else ("limit",))) if self.path is None else ():
            yield key, "belongs to `path`: it would do nothing"
        for column in self.columns:
            if column not in ("prompt", "messages"):
                yield ("columns", column), "would do nothing: of prompts only prompt and messages are read; remove it"
        for key in self.changed(*_OF_SELF) if self.written != "self" else ():
            yield key, "belongs to `written: self`: it would do nothing"


class GeneratedSpec(Spec):
    """Rows that a model writes, once, before the first stage that uses them. Each attempt is drawn with a seed of its own."""

    model: GeneratorSpec = Field(description="Who writes: a path, hub id, `stage:NAME`, adapter, or https://HOST/v1#MODEL.")
    prompts: PromptsSpec = Field(description="self, bos, or rows: {path: FILE} or {source: NAME}.")
    rows: Whole | None = Field(
        None, gt=0, description="Rows wanted; prompts of rows are answered in turn, as often as it takes. Default: each once."
    )
    attempts: Whole | None = Field(
        None, gt=0, description="Attempts at most to get `rows`; fewer rows then are an error (default: 50 for each row)."
    )
    temperature: Number = Field(1.0, ge=0, description="Tokens are drawn at this temperature; 0: the most likely ones.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that together have this probability.")
    max_new_tokens: Whole = Field(256, gt=0, description="Tokens of an answer at most.")
    seed: Seed = Field(0, description="Of what is drawn; it and an attempt's number decide its tokens.")
    keep_unfinished: Flag = Field(False, description="Keep answers that max_new_tokens has cut.")
    min_tokens: Whole = Field(1, gt=0, description="Drop answers of fewer tokens.")
    near_duplicates: Number | None = Field(
        None,
        gt=0,
        lt=1,
        description="Drop rows that share this much (Jaccard index of runs of three words) with a row before; exact duplicates "
        "are always dropped. Needs datasketch (daekit[near-duplicates]).",
    )
    matching: Text | None = Field(None, description="Drop answers in which this regular expression finds nothing.")
    batch_size: Whole = Field(16, gt=0, description="Attempts that are written together.")
    concurrency: Whole = Field(8, gt=0, description="Of an endpoint: calls under way at a time.")

    @property
    def most_attempts(self) -> int | None:
        """The attempts at most; None: one for each prompt."""
        return self.attempts if self.rows is None else self.attempts or 50 * self.rows

    def stages(self) -> set[str]:
        """The stages whose results the model is, or is made of."""
        found = (self.model.stage, adapter_stage(self.model.adapter)) if self.model is not None else ()
        return {name for name in found if name is not None}

    def problems(self) -> Problems:
        """A filter that is none, and what prompts of this kind do not have."""
        if self.matching is not None:
            try:
                re.compile(self.matching)
            except re.error as error:
                yield "matching", f"{self.matching[:80]!r} is no regular expression ({error})"
        if self.rows is None and self.attempts is not None:
            yield "attempts", "belongs to `rows`; without it each prompt is answered once"
        written = None if self.prompts is None else self.prompts.written
        if written is not None and self.rows is None:
            yield "rows", "must say how many rows to write, for there are no prompts to count"
        if written is not None and self.temperature == 0:
            yield "temperature", "is 0, so that all rows would be the same; draw them at 1, say"
        if written is not None and self.model is not None and self.model.url is not None:
            yield ("model", "url"), f"an endpoint answers messages; prompts: {written} needs a model here"
