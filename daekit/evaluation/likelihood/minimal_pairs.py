"""Minimal pairs (BLiMP): is the acceptable sentence the likelier one?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood.common import (
    Measured,
    describe_prefix,
    encode,
    hash_of,
    json_lines,
    prefix_ids,
    read_bytes,
    require_context,
    text_of,
    token_row,
)
from daekit.models.scoring import score_rows
from daekit.models.vocabulary import vocabulary_size
from daekit.progress import ProgressFunction
from daekit.recipe.suite import MinimalPairsSpec


class MinimalPairs:
    """Paradigms of sentence pairs, read from files.

    Raises:
        UserError: no files, an empty one, a row without both sentences. (BLiMP itself has pairs of twice the same sentence:
            they are ties.)
    """

    def __init__(self, name: str, spec: MinimalPairsSpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        path = Path(spec.path).expanduser()
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{self.where}.path: the directory {path} holds no .jsonl file")
        self.data: dict[str, str] = {}
        self.pairs: dict[str, list[tuple[str, str]]] = {}
        for file in files:
            content = read_bytes(file, self.where)
            self.data[file.name] = hash_of(content)
            pairs = []
            for place, row in json_lines(content, file, self.where):
                pairs.append((text_of(row, spec.good, place), text_of(row, spec.bad, place)))
            if not pairs:
                raise UserError(f"{self.where}: {file} has no pairs")
            self.pairs[file.stem] = pairs[: spec.limit]

    def check(self, name: str, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> None:
        """The prefix exists, and every sentence fits."""
        before = len(prefix_ids(tokenizer, self.spec.prefix, self.where))
        longest = before + max(len(ids) for pairs in self.pairs.values() for pair in pairs for ids in encode(tokenizer, pair))
        require_context(name, self.where, longest, context_length, "leave the longer pairs out of the files")

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: ProgressFunction | None = None,
    ) -> Measured:
        """``accuracy`` per paradigm; the domain's own value is their macro average, whatever their sizes."""
        flat = [pair for pairs in self.pairs.values() for pair in pairs]
        goods, bads = self._log_probabilities(model, tokenizer, flat, batch_size, progress)
        found, start = Measured(), 0
        for paradigm, pairs in self.pairs.items():
            part = slice(start, start + len(pairs))
            start += len(pairs)
            right = (goods[part] > bads[part]).astype(np.float64)
            weight = np.full(len(pairs), 1 / len(pairs))  # all paradigms count alike in the sum over all of them
            found.values[self.name, paradigm, "accuracy"] = RowValues(right * weight, weight)
            found.items += [
                {"paradigm": paradigm, "row": index, "good": float(good), "bad": float(bad), "correct": bool(good > bad)}
                for index, (good, bad) in enumerate(zip(goods[part], bads[part], strict=True))
            ]
        prefix = describe_prefix(tokenizer, self.spec.prefix, self.where)
        found.notes.append(
            f"{self.name}: {len(self.pairs)} paradigms, {len(flat)} pairs, macro average; summed log-probability of both "
            f"sentences; "
            f"{prefix}; {int((goods == bads).sum())} ties, which count as wrong."
        )
        return found

    def _log_probabilities(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: list[tuple[str, str]],
        batch_size: int,
        progress: ProgressFunction | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the good and the bad sentences. Each sentence is scored once, so that equal token sequences are exact ties."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        sentences = [before + ids for ids in encode(tokenizer, [sentence for pair in pairs for sentence in pair])]
        index = {ids: at for at, ids in enumerate(dict.fromkeys(map(tuple, sentences)))}
        rows = [token_row(ids, len(before)) for ids in index]
        nll_R = score_rows(model, rows, vocab_size=vocabulary_size(tokenizer), batch_size=batch_size, progress=progress).nll_R
        log_p = -nll_R[[index[tuple(ids)] for ids in sentences]]
        return log_p[0::2], log_p[1::2]
