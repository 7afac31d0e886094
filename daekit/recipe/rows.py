"""Rows of a recipe: where they come from, how they are mixed, and the tokenizer that reads them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from daekit.errors import listed
from daekit.recipe.generated import GeneratedSpec
from daekit.recipe.reading import Choice, FilePath, Flag, Number, Spec, Text, Whole, content
from daekit.recipe.suite import Column
from daekit.recipe.validation import BUILTIN_CORPORA, Problems, bad_name, missing, missing_rows

NO_VALIDATION = "give `validation`, `validation_split` or `holdout`"
SourceColumn = Literal[Column, "teacher_prompt"]


class SourceSpec(Spec):
    """Rows of one domain."""

    domain: Text = Field(description="The name that decides which teacher these rows follow.")
    path: FilePath | None = Field(
        None,
        description="A JSONL or Parquet file, a directory of them, a hub id, or `builtin:NAME` for the embedded corpora "
        f"({', '.join(BUILTIN_CORPORA)}).",
    )
    generated: GeneratedSpec | None = Field(None, description="Instead of `path`: a model writes the rows.")
    split: Text = Field("train", description="Split of a hub data set or of a builtin corpus to train on.")
    name: Text | None = Field(None, description="Configuration name of a hub data set.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set.")
    validation: FilePath | None = Field(None, description="A file, directory or `builtin:NAME` with the rows to evaluate on.")
    validation_split: Text | None = Field(None, description="Split of `path` to evaluate on.")
    holdout: Whole | None = Field(
        None, gt=0, description="Rows to evaluate on instead, from the end of the shuffled training rows."
    )
    limit: Whole | None = Field(None, gt=0, description="Use at most so many training rows (the first ones).")
    validation_limit: Whole | None = Field(None, gt=0, description="Use at most so many validation rows.")
    columns: dict[Annotated[SourceColumn, Choice], Text] = Field(
        {}, description='Our column name -> its name in the data, or a text with names in braces: `"{page}\\n\\n{question}"`.'
    )
    chat: Flag = Field(
        False,
        description="Make of a prompt and a completion that are strings a user's and an assistant's message, so that the "
        "tokenizer's chat template frames them; without it TRL joins the two strings as they are.",
    )

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.validation or self.validation_split or self.holdout)

    def problems(self) -> Problems:
        """Rows from nowhere or from two places, paths that lead nowhere, more than one way to get validation rows, or none."""
        yield from bad_name("domain", self.domain, "domain")
        if self.generated is None and self.path is None:
            yield "path", "this required key is missing: where the rows lie; or give `generated` for rows that a model writes"
        elif self.generated is not None:
            if self.path is not None:
                yield "generated", "excludes `path`: rows lie there, or a model writes them"
            for key in self.changed("split", "name", "revision", "validation_split", "columns", "chat"):
                yield key, "belongs to `path`; the rows of `generated` are as its prompts are"
            rows = self.generated.rows
            if self.holdout is not None and rows is not None and self.holdout >= rows:
                yield "holdout", f"{self.holdout} of the {rows} rows that are written leave none to train on; hold out fewer"
        for column, theirs in self.columns.items():
            rest = re.sub(r"\{[^{}]+\}", "", theirs)
            if rest.count("{") != rest.count("}") or (rest == theirs and "{" in rest):
                yield ("columns", column), f"{theirs!r} has a brace without its other; a column is named so: {{page}}"
        yield from missing_rows("path", self.path)
        yield from missing_rows("validation", self.validation)
        ways = self.changed("validation", "validation_split", "holdout")
        if len(ways) > 1:
            yield ways[-1], f"{listed(ways)} exclude each other; set all but one to null (or leave them out)"
        if not ways and self.validation_limit is not None:
            yield "validation_limit", f"there are no validation rows to limit; {NO_VALIDATION}"


class MixtureSpec(Spec):
    """What a stage trains on.

    A list of source names means all their rows; a mapping ``source: weight`` gives the *share of rows* of each. The long form
    is ``{sources: <list or mapping>, rows: N}``.
    """

    NOUN: ClassVar = "a list of sources ([a, b]) or a share of rows for each ({a: 0.25, b: 0.75})"

    sources: tuple[Text, ...] = Field(min_length=1, description="Names of sources.")
    weights: tuple[Number, ...] = Field(
        (), description="Share of rows of each source, in the order of `sources`; empty: all rows of every source, once."
    )
    rows: Whole | None = Field(
        None,
        gt=0,
        description="Rows of one epoch of a weighted mixture. Default: the most that repeats no row of any source. A source "
        "that has fewer rows than its share asks for is repeated: each row is used n or n + 1 times.",
    )

    @classmethod
    def expand(cls, value: Any) -> Any:
        """``[a, b]``, ``{a: 0.25, b: 0.75}``, or either of them as ``{sources: ..., rows: N}``."""
        if not isinstance(value, dict | list):
            return value
        values = dict(value) if "sources" in value and isinstance(value, dict) else {"sources": value}
        sources = content(values["sources"])
        return values | {"sources": [*sources], "weights": [*sources.values()]} if isinstance(sources, dict) else values

    def problems(self) -> Problems:
        """Sources that are named twice, and shares that are none."""
        for source in {source for source in self.sources or () if self.sources.count(source) > 1}:
            yield (), f"the source {source!r} is listed twice; give it a weight instead"
        for source, weight in zip(self.sources or (), self.weights, strict=False):
            if weight <= 0:
                yield (), f"the weight of {source!r} is {weight}, must be greater than 0; or leave the source out"
        if self.rows is not None and not self.weights:
            weighted = "{sources: {a: 0.25, b: 0.75}, rows: N}"
            yield "rows", f"rows belongs to a weighted mixture ({weighted}); to use fewer rows of a source set its `limit`"

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """The long form, of a mapping if there are weights."""
        weights = dumped.pop("weights")
        return dumped | {"sources": dict(zip(self.sources, weights, strict=True))} if weights else dumped


class TokenizerTraining(Spec):
    """A tokenizer trained on the training rows of some sources."""

    vocab_size: Whole = Field(gt=0, description="Its size, special tokens included.")
    sources: tuple[Text, ...] = Field((), description="Names of the sources to read (default: all).")
    kind: Annotated[Literal["bpe", "words"], Choice] = Field(
        "bpe", description="bpe (byte-level) or words (one token per word, digit and punctuation mark: for small worlds)."
    )


class TokenizerSpec(Spec):
    """Where the tokenizer comes from: a hub id, a directory or a SentencePiece/tokenizers file, or training on the data.

    A plain text is short for ``{path: ...}``. Not needed when the first student is loaded from a path.
    """

    NOUN: ClassVar = "a path or a mapping"

    path: FilePath | None = Field(None, description="Hub id, directory or file.")
    train: TokenizerTraining | None = Field(None, description="Train one instead.")
    chat_template: Text | None = Field(None, description="A Jinja template, or a file that holds one, in place of its own.")
    trust_remote_code: Flag = Field(False, description="Run the tokenizer's own code from its directory or hub repository.")

    def problems(self) -> Problems:
        """One way to get it."""
        if (self.path is None) == (self.train is None):
            yield (), "needs exactly one of path and train"
        yield from missing("path", self.path, suffixes=(".json", ".model"))

    @classmethod
    def expand(cls, value: Any) -> Any:
        """``PATH`` is short for ``{path: PATH}``."""
        return {"path": value} if isinstance(value, str) else value
