"""Perplexity and bits per byte of running text, by strided windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood import common
from daekit.evaluation.likelihood.common import Measured, TokenRow, prefix_ids
from daekit.models.scoring import score_tokens
from daekit.models.vocabulary import vocabulary_size
from daekit.progress import ProgressFunction
from daekit.protocol import IGNORE_INDEX
from daekit.recipe.suite import PerplexitySpec


class Perplexity:
    """Texts of one or more domains, read from files.

    Raises:
        UserError: a missing or empty file, one that is not UTF-8 text, a row without text.
    """

    def __init__(self, name: str, spec: PerplexitySpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        self.data: dict[str, str] = {}
        self.documents = {domain: self._read(domain, Path(path).expanduser()) for domain, path in spec.texts.items()}

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """The window fits the model, and the tokenizer says where its tokens lie in the text."""
        prefix_ids(tokenizer, self.spec.prefix, self.where)
        remedy = "set a smaller window and stride"
        common.require_context(name, f"{self.where}.window", self.spec.window, context_length, remedy)
        if not tokenizer.is_fast:
            raise UserError(
                f"{self.where}: the tokenizer of models.{name} ({type(tokenizer).__name__}) does not say where its tokens lie "
                "in the text, which the bytes of a block need; use a model with a tokenizer.json"
            )

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """``nll`` (and so ``perplexity``) per token and ``bits_per_byte``, by domain."""
        found = Measured()
        for domain, documents in self.documents.items():
            blocks, unknown = self._blocks(model, tokenizer, documents, batch_size)
            found.values[domain, self.name, "nll"] = RowValues(blocks.nll_R, blocks.tokens_R)
            found.values[domain, self.name, "bits_per_byte"] = RowValues(blocks.nll_R / math.log(2), blocks.bytes_R)
            found.items += [
                {"domain": domain, "block": at, "nll": float(nll), "tokens": int(tokens), "bytes": int(size)}
                for at, (nll, tokens, size) in enumerate(zip(*blocks, strict=True))
            ]
            if unknown:
                found.notes.append(
                    f"{domain}: {unknown} tokens are {tokenizer.unk_token}: what the tokenizer cannot say costs nothing more "
                    "here, so its values are too good to be compared with another tokenizer's."
                )
            found.notes.append(
                f"{domain}: {len(documents)} documents, {int(blocks.bytes_R.sum()):,} bytes, {int(blocks.tokens_R.sum()):,} "
                f"tokens; windows of {self.spec.window} tokens, {self.spec.stride} apart; "
                f"{common.describe_prefix(tokenizer, self.spec.prefix, self.where)}; resampled in blocks of {self.spec.block} "
                "characters."
            )
        return found

    def _blocks(
        self, model: PreTrainedModel, tokenizer: Tokenizer, documents: Sequence[str], batch_size: int
    ) -> tuple[Blocks, int]:
        """The blocks of all documents, and how many tokens are unknown ones."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        parts, unknown = [], 0
        for text in documents:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, starts = encoded["input_ids"], np.array([start for start, _ in encoded["offset_mapping"]])
            rows = windows(before + ids, self.spec.window, self.spec.stride)
            nll_N = np.concatenate(score_tokens(model, rows, vocab_size=vocabulary_size(tokenizer), batch_size=batch_size))
            first = 0 if before else 1  # without a prefix nothing predicts the first token
            skipped = 0 if before else len(text[: encoded["offset_mapping"][0][1]].encode())
            parts.append(blocks_of(text, self.spec.block, nll_N, starts[first:], skipped))
            unknown += 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        return Blocks(*map(np.concatenate, zip(*parts, strict=True))), unknown

    def _read(self, domain: str, path: Path) -> list[str]:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        documents: list[str] = []
        for file in files:
            if file.suffix in (".jsonl", ".ndjson"):
                documents += [common.text_of(row, self.spec.column, place) for place, row in common.lines(file, self.where)]
            else:
                documents.append(common.read_text(file, self.where))
            self.data[f"{domain}/{file.name}"] = common.hash_of(file, self.where)
        documents = documents[: self.spec.limit]
        if not documents or not all(text.strip() for text in documents):
            raise UserError(f"{self.where}.texts.{domain}: {path} has no text (a directory: no *.txt file), or an empty one")
        return documents


class Blocks(NamedTuple):
    """Sums over the tokens that begin in each of R blocks of text."""

    nll_R: np.ndarray
    tokens_R: np.ndarray
    bytes_R: np.ndarray


def windows(ids: Sequence[int], window: int, stride: int) -> list[TokenRow]:
    """Rows that score every id but the first exactly once, in order, with at least ``window - stride`` ids before it from
    the second window on."""
    rows = [{"input_ids": list(ids[:window]), "labels": list(ids[:window])}]
    for start in range(stride, len(ids) - window + stride, stride):
        part = list(ids[start : start + window])
        rows.append({"input_ids": part, "labels": [IGNORE_INDEX] * (window - stride) + part[window - stride :]})
    return rows


def blocks_of(text: str, size: int, nll_N: np.ndarray, start_N: np.ndarray, skipped: int) -> Blocks:
    """Sums over blocks of ``size`` characters; a token belongs to the block in which it begins.

    Args:
        nll_N: NLL of each token.
        start_N: the character at which it begins.
        skipped: bytes at the beginning of the text that are not scored.
    """
    bytes_R = np.array([len(text[at : at + size].encode()) for at in range(0, len(text), size)], dtype=np.float64)
    bytes_R[0] -= skipped
    block_N = start_N // size
    return Blocks(
        np.bincount(block_N, weights=nll_N, minlength=len(bytes_R)),
        np.bincount(block_N, minlength=len(bytes_R)).astype(np.float64),
        bytes_R,
    )
