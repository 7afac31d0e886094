"""Minimal pairs (BLiMP): is the acceptable sentence the likelier one?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.likelihood import common
from daekit.evaluation.likelihood.common import Measured, prefix_ids, text_of
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
        self.pairs: dict[str, list[tuple[str, str]]] = {}
        for file in files:
            rows = common.lines(file, self.where)
            pairs = [(text_of(row, spec.good, place), text_of(row, spec.bad, place)) for place, row in rows]
            if not pairs:
                raise UserError(f"{self.where}: {file} has no pairs")
            self.pairs[file.stem] = pairs[: spec.limit]
        self.data = {file.name: common.hash_of(file, self.where) for file in files}

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """The prefix exists, and every sentence fits."""
        longest = max(map(len, self._sentences(tokenizer)))
        common.require_context(name, self.where, longest, context_length, "leave the longer pairs out of the files")

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """``accuracy`` per paradigm; the domain's own value is their macro average, whatever their sizes.

        Each sentence is scored once, so that equal token sequences are exact ties.
        """
        sentences, start = self._sentences(tokenizer), len(prefix_ids(tokenizer, self.spec.prefix, self.where))
        index = {ids: at for at, ids in enumerate(dict.fromkeys(map(tuple, sentences)))}
        rows = [common.token_row(ids, start) for ids in index]
        size = vocabulary_size(tokenizer)
        log_p = -score_rows(model, rows, vocab_size=size, batch_size=batch_size, progress=progress).nll_R
        log_p = log_p[[index[tuple(ids)] for ids in sentences]]
        goods, bads = log_p[0::2], log_p[1::2]
        found, start = Measured(), 0
        for paradigm, pairs in self.pairs.items():
            part = slice(start, start + len(pairs))
            start += len(pairs)
            right = (goods[part] > bads[part]).astype(np.float64)
            weight = np.full(len(pairs), 1 / len(pairs))  # all paradigms count alike in the sum over all of them
            found.values[self.name, paradigm, "accuracy"] = RowValues(right * weight, weight)
            found.items += [
                {"paradigm": paradigm, "row": at, "good": float(good), "bad": float(bad), "correct": bool(good > bad)}
                for at, (good, bad) in enumerate(zip(goods[part], bads[part], strict=True))
            ]
        found.notes.append(
            f"{self.name}: {len(self.pairs)} paradigms, {len(goods)} pairs, macro average; summed log-probability of both "
            f"sentences; {common.describe_prefix(tokenizer, self.spec.prefix, self.where)}; {int((goods == bads).sum())} ties, "
            "which count as wrong."
        )
        return found

    def _sentences(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of all sentences, good and bad in turn."""
        before = prefix_ids(tokenizer, self.spec.prefix, self.where)
        texts = [sentence for pairs in self.pairs.values() for pair in pairs for sentence in pair]
        return [before + ids for ids in common.encode(tokenizer, texts)]
