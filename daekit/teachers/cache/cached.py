"""A teacher that is read from disk: nothing is loaded but its output head, and only where hidden states are kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.vocabulary import tokenizer_facts
from daekit.protocol import Batch, FeatureSpec, Member, OutputHead, TeacherOutput, TopK
from daekit.recipe.objective import Objective
from daekit.teachers.cache.asking import autocast_dtype
from daekit.teachers.cache.rows import CacheRow, rows_of_batch
from daekit.teachers.cache.store import CacheStore, require_facts
from daekit.teachers.cache.values import read_sampled, read_top_k


class CachedTeacher:
    """What a teacher said about rows when ``write_cache`` asked it.

    A row is found by its token ids and loss positions, wherever it lies in a batch, padded or packed. Where hidden states are
    kept, its outputs are those of the live teacher to the bit, as far as those do not depend on the shape of the batch (see
    docs/caches.md).

    Args:
        directory: a cache that is whole.
        tokenizer: the student's, compared with that of the cache.

    Raises:
        UserError: no whole cache; another tokenizer.
    """

    def __init__(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.store = CacheStore(directory)
        self.facts = self.store.facts
        self._heads: list[OutputHead] | None = None
        if tokenizer is not None:
            self.require_tokenizer(tokenizer)

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """One output for all loss positions, on the device of the batch.

        Raises:
            UserError: rows that are not in the cache; a corrupt shard; hidden states under another autocast.
        """
        device = batch.labels_BT.device
        rows = [row for row in rows_of_batch(batch) if len(row.offsets)]
        self.require_rows(rows)
        keys = [row.key for row in rows]
        positions_M = torch.arange(batch.labels_N.numel(), device=device)
        keep = self.facts["keep"]
        if keep == "hidden":
            if self.facts["autocast"] != (now := autocast_dtype(device)):
                raise UserError(
                    f"{self.store.directory}: its hidden states were made with autocast {self.facts['autocast']} and the "
                    f"student runs with {now} (bf16 of the trainer); use the same, or write another cache"
                )
            return [TeacherOutput(positions_M, self._members(keys, device), self.facts["average"])]
        if not keys:  # a rank that asks only because another must
            none_M1 = torch.zeros(0, 1, device=device)
            nothing = TopK(none_M1.long(), none_M1, self.facts["temperature"], none_M1[:, 0])
            return [TeacherOutput(positions_M, (), top_k=nothing)]
        read = read_top_k if keep == "top_k" else read_sampled
        return [TeacherOutput(positions_M, (), top_k=read(partial(self.store.values, keys), self.facts, device))]

    def _members(self, keys: list[bytes], device: torch.device) -> tuple[Member, ...]:
        members = []
        for index, (about, head) in enumerate(zip(self.facts["members"], self._heads_on(device), strict=True)):
            none_0H = torch.empty(0, about["width"], dtype=getattr(torch, self.facts["dtype"][index]))
            hidden_NH = self.store.values(keys, f"hidden.{index}") if keys else none_0H
            members.append(Member(hidden_NH.to(device), head, about["weight"]))
        return tuple(members)

    def _heads_on(self, device: torch.device) -> list[OutputHead]:
        if self._heads is None or self._heads[0].weight.device != device:
            tensors: dict[str, Tensor] = {name: each.to(device) for name, each in self.store.heads().items()}
            size, members = self.facts["vocab_size"], enumerate(self.facts["members"])
            self._heads = [
                OutputHead(tensors[f"weight.{i}"], tensors.get(f"bias.{i}"), size, about["scale"], about["softcap"])
                for i, about in members
            ]
        return self._heads

    def to(self, device: torch.device) -> CachedTeacher:
        """Nothing to move: outputs are on the device of the batch."""
        return self

    def identity(self) -> dict[str, object]:
        """The facts that decide the values: teacher, what is kept of it, temperature, precision, tokenizer."""
        return {"kind": "cache"} | {key: value for key, value in self.facts.items() if key != "source"}

    def require_served(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, rows: Iterable[CacheRow]) -> None:
        """See ``DemandingTeacher``."""
        self.require_objective(objective)
        self.require_tokenizer(tokenizer)
        self.require_rows(rows)

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare a tokenizer with that of the cache, by content."""
        require_facts(self.store.directory, self.facts, {"tokenizer": tokenizer_facts(tokenizer)})

    def require_objective(self, objective: Objective) -> None:
        """Refuse losses that this cache cannot serve.

        Raises:
            UserError: another temperature, a divergence that drawn tokens do not give, features of layers.
        """
        if objective.on_policy:
            raise UserError(
                f"on_policy={objective.on_policy:g}: a cache holds what its teacher said of the rows it was made of, and the "
                "student is yet to write these. Give the teacher itself, or set on_policy to 0"
            )
        if objective.attention_weight or objective.hidden_weight:
            raise UserError(
                "attention_weight, hidden_weight: a cache keeps a teacher's distributions, not what its layers did (which "
                "would be 10 to 100 times as large). Set both to 0, or leave `cache` out."
            )
        kept, directory = self.facts["keep"], self.store.directory
        if kept == "hidden" or not objective.prediction_weight:
            return
        if objective.temperature != self.facts["temperature"]:
            raise UserError(
                f"temperature: the loss has {objective.temperature} and {directory} was made at {self.facts['temperature']} "
                f"(keep: {kept}); use the same, write another cache, or keep hidden states, which serve every temperature"
            )
        if kept == "sampled" and objective.divergence != "forward_kl":
            raise UserError(
                f"divergence: {objective.divergence} with {directory} (keep: sampled); drawn tokens give forward_kl only. Use "
                "it, or keep hidden or top_k"
            )

    def require_rows(self, rows: Iterable[CacheRow]) -> None:
        """Refuse rows that are not there; those without loss need not be.

        Raises:
            UserError: it counts them and names the first.
        """
        missing, asked = [], 0
        for row in (row for row in rows if len(row.offsets)):
            asked += 1
            if row.key not in self.store.index:
                missing.append(row)
        if missing:
            self.store.check_all()  # a key that changed on the disk is no missing row
            raise UserError(
                f"{self.store.directory}: {len(missing):,} of {asked:,} rows are not in this cache (first: {missing[0]}). It "
                "knows rows by token ids and loss positions: other data or teacher_prompts, another chat template or "
                "max_length, or packing that splits rows, make other rows. Write it again with these rows: only they are "
                "computed."
            )
