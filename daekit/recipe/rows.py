"""Rows of a recipe: where they come from, how they are mixed, and the tokenizer that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from daekit.recipe.generated import GeneratedSpec
from daekit.recipe.model import placed
from daekit.recipe.reading import Choice, Flag, Leaf, Number, Spec, Text, Whole, Written, WrittenList, as_text
from daekit.recipe.suite import Column

BUILTIN_CORPORA = ("skills", "chat", "shop")  # the embedded corpora that ``path: builtin:NAME`` may name


class SourceSpec(Spec):
    """Rows of one domain."""

    domain: Text = Field(description="The name that decides which teacher these rows follow.")
    path: Text | None = Field(
        None,
        description="A JSONL or Parquet file, a directory of them, a hub id, or `builtin:NAME` for the embedded corpora "
        f"({', '.join(BUILTIN_CORPORA)}).",
    )
    generated: GeneratedSpec | None = Field(None, description="Instead of `path`: a model writes the rows.")
    split: Text = Field("train", description="Split of a hub data set or of a builtin corpus to train on.")
    name: Text | None = Field(None, description="Configuration name of a hub data set.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set.")
    validation: Text | None = Field(None, description="A file, directory or `builtin:NAME` with the rows to evaluate on.")
    validation_split: Text | None = Field(None, description="Split of `path` to evaluate on.")
    holdout: Whole | None = Field(
        None, gt=0, description="Rows taken from the end of the (seeded) shuffled training rows, to evaluate on instead."
    )
    limit: Whole | None = Field(None, gt=0, description="Use at most so many training rows (the first ones).")
    validation_limit: Whole | None = Field(None, gt=0, description="Use at most so many validation rows.")
    columns: dict[Annotated[Column, Choice], Text] = Field({}, description="Our column name -> its name in the data.")
    chat: Flag = Field(
        False,
        description="Make of a prompt and a completion that are strings a user's and an assistant's message, so that the "
        "tokenizer's chat template frames them; without it TRL joins the two strings as they are.",
    )

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.validation or self.validation_split or self.holdout)


class MixtureSpec(Spec):
    """What a stage trains on.

    A list of source names means all their rows; a mapping ``source: weight`` gives the *share of rows* of each. The long form
    is ``{sources: <list or mapping>, rows: N}``.
    """

    NOUN: ClassVar = "a list of sources ([a, b]) or a share of rows for each ({a: 0.25, b: 0.75})"

    sources: tuple[Text, ...] = Field(description="Names of sources.")
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
        if isinstance(value, Leaf) or not isinstance(value, (Mapping, list)):
            return value
        long = isinstance(value, Mapping) and "sources" in value
        values = dict(value) if long else {"sources": value}
        if isinstance(values["sources"], Mapping) and "weights" not in values:
            values |= {"sources": list(values["sources"]), "weights": list(values["sources"].values())}
        return Written(values, value.path) if isinstance(value, (Written, WrittenList)) else values

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """The long form, of a mapping if there are weights."""
        weights = dumped.pop("weights")
        return dumped | {"sources": dict(zip(self.sources, weights, strict=True))} if weights else dumped


class TokenizerTraining(Spec):
    """A tokenizer trained on the training rows of some sources."""

    vocab_size: Whole = Field(gt=0, description="Its size, special tokens included.")
    sources: tuple[Text, ...] = Field((), description="Names of the sources to read (default: all).")
    kind: Annotated[Literal["bpe", "words"], Choice] = Field(
        "bpe",
        description="bpe (byte-level) or words (one token per word, digit and punctuation mark: for small worlds).",
    )


class TokenizerSpec(Spec):
    """Where the tokenizer comes from: a hub id, a directory or a SentencePiece/tokenizers file, or training on the data.

    A plain text is short for ``{path: ...}``. Not needed when the first student is loaded from a path.
    """

    NOUN: ClassVar = "a path or a mapping"

    path: Text | None = Field(None, description="Hub id, directory or file.")
    train: TokenizerTraining | None = Field(None, description="Train one instead.")
    chat_template: Text | None = Field(None, description="A Jinja template, or a file that holds one, in place of its own.")
    trust_remote_code: Flag = Field(False, description="Run the tokenizer's own code from its directory or hub repository.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """``PATH`` is short for ``{path: PATH}``."""
        text = None if isinstance(value, Mapping) else as_text(value)
        return placed({"path": text}, value) if isinstance(text, str) else value
