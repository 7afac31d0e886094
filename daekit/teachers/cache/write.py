"""Writes a cache: each different row through the teacher once, shard by shard, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.vocabulary import tokenizer_facts
from daekit.protocol import Teacher, TeacherOutput, TopK
from daekit.teachers.cache.asking import AskedTeacher, autocast_dtype, head_tensors, require_one_teacher
from daekit.teachers.cache.rows import KEY_BYTES, CacheRow, rows_of_examples
from daekit.teachers.cache.store import FORMAT, MANIFEST, CacheStore, begin, committed_shard, finish, write_shard, writer_lock
from daekit.teachers.cache.values import CacheFormat, stacked, values_of

Progress = Callable[[int, int], None]
BATCH_TOKENS, SHARD_BYTES = 8192, 2**28


def write_cache(
    teacher: Teacher,
    rows: Iterable[Any],
    directory: str | Path,
    *,
    keep: str = "hidden",
    k: int = 64,
    draws: int = 50,
    temperature: float = 1.0,
    seed: int = 0,
    forced_ids: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    batch_tokens: int = BATCH_TOKENS,
    shard_bytes: int = SHARD_BYTES,
    ranks: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> None:
    """Keep what a teacher says about rows; what is there already is not computed again.

    Rows run padded to a multiple of 64 tokens, as they do in a training with ``pad_to_multiple_of=64``. Memory: the teacher,
    the values of one shard, and 4 bytes per token of all rows.

    Args:
        teacher: a model, adapter or ensemble; of a routed teacher each part has its own cache.
        rows: tokenised rows (``trainer.train_dataset``), or Batches; see ``rows_of_examples``. Equal rows are kept once.
        directory: where the cache lies; made if it is not there.
        keep: ``hidden``: hidden states and output head, exact for every divergence and temperature; ``top_k``: the ``k`` most
            likely tokens, with the label and ``forced_ids`` among them, and the log-mass of all others, at ``temperature``;
            ``sampled``: ``draws`` drawn tokens, with ``seed``, for forward KL at temperature 1.
        k: see keep.
        draws: see keep, at most 255.
        temperature: see keep.
        seed: see keep.
        forced_ids: see keep.
        tokenizer: whose ids the rows are; kept by content, so that another one is refused when the cache is used.
        source: further facts, JSON-able, that must be the same wherever this cache is written or used.
        device: where the teacher runs; default: it stays where it is.
        batch_tokens: tokens per forward, padding included; a longer row runs alone.
        shard_bytes: size of a file, about.
        ranks: (rank, world) of this process, which writes the shards ``rank, rank + world, ...``; default: those of
            torch.distributed. Every rank must be given the same rows. Whoever is last writes the manifest.
        progress: called with the loss tokens that this rank has written, and will have.

    Raises:
        UserError: the directory holds the cache of another teacher, tokenizer, temperature or format; another process writes
            it; the disk is full; a teacher that cannot be kept.
    """
    form = CacheFormat(keep, k, draws, temperature, seed, tuple(forced_ids))
    require_one_teacher(teacher)
    kept = {row.key: row for row in rows_of_examples(rows) if len(row.offsets)}
    if not kept:
        raise UserError("rows: none of them has a token that carries loss, so there is nothing to keep")
    rank, world = ranks or ((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))
    with writer_lock(Path(directory), rank):
        writer = _Writer(AskedTeacher(teacher, device), form, Path(directory), tokenizer, source, batch_tokens, shard_bytes)
        writer.write(list(kept.values()), rank, world, progress)


@dataclass
class _Writer:
    asked: AskedTeacher
    form: CacheFormat
    directory: Path
    tokenizer: PreTrainedTokenizerBase | None
    source: Mapping[str, Any] | None
    batch_tokens: int
    shard_bytes: int

    def write(self, rows: list[CacheRow], rank: int, world: int, progress: Progress | None) -> None:
        """Compute this rank's shards of the rows that are missing; the last rank that is ready writes the manifest."""
        sample, _ = self.asked.ask(rows[:1])
        heads = save(head_tensors(sample)) if self.form.keep == "hidden" else b""
        facts, heads_hash = begin(self.directory, self._facts(sample), heads)
        del heads  # a gigabyte of a large teacher
        there = (self.directory / MANIFEST).is_file()
        store = CacheStore(self.directory, mending=True) if there else None
        kept = {} if store is None else {int(shard.file[6:11]): shard for shard in store.shards}
        missing = rows if store is None else [row for row in rows if row.key not in store.index]
        token_bytes = self.form.token_bytes([m.hidden_MH.shape[1] * m.hidden_MH.element_size() for m in sample.members])
        groups = _shards_of(missing, token_bytes, self.shard_bytes)
        free = (number for number in range(len(kept) + len(groups)) if number not in kept)
        plan = [(number, group, _plan_hash(group)) for number, group in zip(free, groups, strict=True)]
        own = plan[rank::world]
        total, written = sum(len(row.offsets) for _, group, _ in own for row in group), 0
        for number, group, keys in own:
            if committed_shard(self.directory, number, keys) is None:
                write_shard(self.directory, number, self._values(group), keys)
            written += sum(len(row.offsets) for row in group)
            if progress is not None:
                progress(written, total)
        made = [committed_shard(self.directory, number, keys) for number, _, keys in plan]
        if all(made):
            finish(self.directory, facts, heads_hash, [*kept.values(), *filter(None, made)])

    def _facts(self, sample: TeacherOutput) -> dict[str, Any]:
        """What decides the values, by an output of the teacher."""
        members = sample.members
        if sample.top_k is not None:
            self._require_sparse(sample.top_k)
        facts = self.form.facts() | {
            "format": FORMAT,
            "teacher": self.asked.identity,
            "tokenizer": None if self.tokenizer is None else tokenizer_facts(self.tokenizer),
            "source": None if self.source is None else dict(self.source),
            "autocast": autocast_dtype(self.asked.device),
            "dtype": [str(member.hidden_MH.dtype).removeprefix("torch.") for member in members],
            "vocab_size": members[0].head.vocab_size if members else self.asked.teacher.vocab_size,  # type: ignore[attr-defined]
        }
        if self.form.keep != "hidden":
            return facts
        about = [
            {"weight": m.weight, "scale": m.head.scale, "softcap": m.head.softcap, "width": m.hidden_MH.shape[1]}
            for m in members
        ]
        return facts | {"average": sample.average, "members": about}

    def _require_sparse(self, top_k: TopK) -> None:
        """Refuse what a teacher that names K tokens does not give; UserError."""
        form, vocab_size = self.form, getattr(self.asked.teacher, "vocab_size", None)
        k = top_k.ids_MK.shape[1]
        if form.keep != "top_k" or vocab_size is None or min(form.k, vocab_size) != k or form.temperature != top_k.temperature:
            raise UserError(
                f"{type(self.asked.teacher).__name__}: gives sparse distributions, {k} tokens at T={top_k.temperature}; "
                f"keep: {form.keep} with k={form.k} at temperature {form.temperature} was asked for. Use keep: top_k with these"
            )
        if form.forced_ids:
            raise UserError("forced_ids: a server names its most likely tokens and the label; leave them out")

    def _values(self, rows: list[CacheRow]) -> dict[str, Tensor]:
        """The tensors of a shard; rows of about the same length run together."""
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids)):
            if not batches or (len(batches[-1]) + 1) * self.asked.padded(rows[index]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(index)
        values: dict[int, dict[str, Tensor]] = {}
        for batch in batches:
            chosen = [rows[index] for index in batch]
            values |= zip(batch, values_of(self.form, *self.asked.ask(chosen), chosen), strict=True)
        return stacked([values[index] for index in range(len(rows))], rows)


def _shards_of(rows: list[CacheRow], token_bytes: int, shard_bytes: int) -> list[list[CacheRow]]:
    """The rows in their order, in groups that make a file of about ``shard_bytes`` each."""
    groups: list[list[CacheRow]] = []
    room = 0
    for row in rows:
        size = len(row.offsets) * token_bytes + KEY_BYTES + 8
        if room < size or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append(row)
        room -= size
    return groups


def _plan_hash(rows: Iterable[CacheRow]) -> str:
    return hashlib.sha256(b"".join(row.key for row in rows)).hexdigest()[:32]
