"""What a cache keeps of a distribution, per loss position: hidden states, the K most likely tokens, or drawn tokens.

Bytes per loss position: ``hidden`` width x bytes of the dtype, per member; ``top_k`` 5 K + 4; ``sampled`` 1 + 4 x the number
of different tokens among the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.models.heads import teacher_log_probs
from daekit.protocol import TeacherOutput, TopK
from daekit.recipe.teacher import KEEPS
from daekit.teachers.cache.rows import CacheRow

CHUNK_VALUES = 2**24  # log-probabilities that are there at a time
_MOST_DRAWS = 255  # a count is one byte


@dataclass(frozen=True)
class CacheFormat:
    """What is kept.

    Attributes:
        keep: ``hidden``, ``top_k`` or ``sampled``.
        k: with top_k, tokens per loss position, the forced ones among them.
        draws: with sampled, tokens drawn per loss position.
        temperature: with top_k, T of the softmax; sampled draws at 1; hidden states have none.
        seed: with sampled, the seed of the draws.
        forced_ids: with top_k, tokens that are kept whatever their probability (end of turn), beside the label.

    Raises:
        UserError: a value that is out of bounds.
    """

    keep: str = "hidden"
    k: int = 64
    draws: int = 50
    temperature: float = 1.0
    seed: int = 0
    forced_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise UserError(f"keep: {self.keep!r} is unknown; choose one of {', '.join(KEEPS)}")
        if self.keep == "sampled" and self.temperature != 1.0:
            raise UserError(
                f"temperature: {self.temperature} with keep: sampled; drawn tokens give an unbiased forward KL at 1 only. Set "
                "it to 1, or keep hidden or top_k"
            )
        if self.keep == "sampled" and not 1 <= self.draws <= _MOST_DRAWS:
            raise UserError(f"draws: {self.draws} is not between 1 and {_MOST_DRAWS}")
        if self.keep == "top_k" and self.k <= len(set(self.forced_ids)) + 1:
            raise UserError(f"k: {self.k} leaves no room beside the label and {len(set(self.forced_ids))} forced tokens")

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> CacheFormat:
        """The format of the cache with these facts."""
        return cls(**{each.name: facts[each.name] for each in fields(cls) if each.name in facts})

    def facts(self) -> dict[str, object]:
        """What of it decides the values, JSON-able."""
        if self.keep == "hidden":
            return {"keep": "hidden"}
        if self.keep == "sampled":
            return {"keep": "sampled", "draws": self.draws, "seed": self.seed, "temperature": 1.0}
        forced = sorted(set(self.forced_ids))
        return {"keep": "top_k", "k": self.k, "temperature": self.temperature, "forced_ids": forced}

    def token_bytes(self, widths: Sequence[int]) -> int:
        """Bytes per loss position; of drawn tokens an estimate, as many are drawn twice.

        Args:
            widths: bytes of a hidden state, of each member.
        """
        if self.keep == "hidden":
            return sum(widths)
        return 5 * self.k + 4 if self.keep == "top_k" else self.drawn_bytes(max(1, self.draws // 4))

    @staticmethod
    def drawn_bytes(different: int) -> int:
        """Bytes of a loss position at which so many different tokens were drawn: their number, an id and a count of each."""
        return 1 + 4 * different


def values_of(form: CacheFormat, output: TeacherOutput, labels_N: Tensor, rows: Sequence[CacheRow]) -> list[dict[str, Tensor]]:
    """What is kept of each row, in host memory.

    Args:
        form: what to keep.
        output: the teacher's, for all loss positions of the rows in their order.
        labels_N: the token that each position predicts.
        rows: the rows of the batch, in its order.
    """
    counts = [len(row.offsets) for row in rows]
    if form.keep == "hidden":
        parts = {f"hidden.{index}": member.hidden_MH.cpu() for index, member in enumerate(output.members)}
    elif form.keep == "top_k":
        parts = _most_likely(form, output, labels_N)
    else:
        return _drawn(form, output, rows)
    split = {name: values.split(counts) for name, values in parts.items()}
    return [{name: values[row] for name, values in split.items()} for row in range(len(rows))]


def _most_likely(form: CacheFormat, output: TeacherOutput, labels_N: Tensor) -> dict[str, Tensor]:
    """The K most likely tokens with label and forced ones, and the log-mass of all others, which is taken before rounding."""
    if output.top_k is not None:
        sparse, tail_M = output.top_k, output.top_k.tail_log_mass_M
        tail_M = torch.full_like(labels_N, -torch.inf, dtype=torch.float32) if tail_M is None else tail_M.float()
        kept = {"ids": ids_to_bytes(sparse.ids_MK), "log_probs": sparse.log_probs_MK.half(), "tail": tail_M}
        return {name: values.cpu() for name, values in kept.items()}
    vocab_size, positions = output.members[0].head.vocab_size, labels_N.numel()
    k = min(form.k, vocab_size)
    ids, log_probs, tails = [], [], []
    step = max(1, CHUNK_VALUES // vocab_size)
    for start in range(0, positions, step):
        chunk = slice(start, start + step)
        all_MV = teacher_log_probs(output, chunk, form.temperature)
        rank_MV = all_MV.scatter(-1, labels_N[chunk, None], torch.inf)
        rank_MV[:, list(form.forced_ids)] = torch.inf
        ids_MK = rank_MV.topk(k, -1).indices.sort(-1).values
        ids.append(ids_to_bytes(ids_MK).cpu())
        log_probs.append(all_MV.gather(-1, ids_MK).half().cpu())
        tails.append(all_MV.scatter(-1, ids_MK, -torch.inf).logsumexp(-1).float().cpu())
    return {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs), "tail": torch.cat(tails)}


def _drawn(form: CacheFormat, output: TeacherOutput, rows: Sequence[CacheRow]) -> list[dict[str, Tensor]]:
    """Draws of each row with a generator of its own, so that they depend on nothing but the row and the seed."""
    found, end = [], 0
    for row in rows:
        start, end = end, end + len(row.offsets)
        probabilities_MV = teacher_log_probs(output, slice(start, end)).exp()
        generator = torch.Generator(probabilities_MV.device)
        generator.manual_seed(int.from_bytes(row.key[:7], "little") ^ form.seed)
        drawn_MD = torch.multinomial(probabilities_MV, form.draws, True, generator=generator).sort(-1).values
        new_MD = torch.ones_like(drawn_MD, dtype=torch.bool)
        new_MD[:, 1:] = drawn_MD[:, 1:] != drawn_MD[:, :-1]
        first_S = new_MD.flatten().nonzero().flatten()  # position M ends where M + 1 begins, for its first draw is new
        counts_S = first_S.diff(append=first_S.new_tensor([drawn_MD.numel()]))
        values = {"distinct": new_MD.sum(-1), "entry_counts": counts_S}
        found.append({name: each.to(torch.uint8).cpu() for name, each in values.items()})
        found[-1]["entry_ids"] = ids_to_bytes(drawn_MD.flatten()[first_S]).cpu()
    return found


def stacked(values: Sequence[dict[str, Tensor]], rows: Sequence[CacheRow]) -> dict[str, Tensor]:
    """The tensors of a shard from those of its rows, with the rows' keys and bounds."""
    tensors = {name: torch.cat([row[name] for row in values]) for name in values[0]}
    tensors["keys"] = torch.tensor([list(row.key) for row in rows], dtype=torch.uint8)
    tensors["bounds"] = _bounds([len(row.offsets) for row in rows])
    if "entry_ids" in tensors:
        tensors["entry_bounds"] = _bounds([len(row["entry_ids"]) for row in values])
    return tensors


def _bounds(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def read_top_k(read: Callable[[str], Tensor], facts: Mapping[str, Any], device: torch.device) -> TopK:
    """The sparse distributions of some rows, one after another; in float32, scaled to sum to 1 where all tokens are named."""
    ids, log_probs_MK, tail_M = (read(name).to(device) for name in ("ids", "log_probs", "tail"))
    ids_MK = bytes_to_ids(ids)
    if ids_MK.shape[1] == facts["vocab_size"]:
        return TopK(ids_MK, log_probs_MK.float().log_softmax(-1), facts["temperature"])
    return TopK(ids_MK, log_probs_MK, facts["temperature"], tail_M)


def read_sampled(read: Callable[[str], Tensor], facts: Mapping[str, Any], device: torch.device) -> TopK:
    """The drawn tokens of some rows as distributions that give all other tokens the probability 0.

    K is the most different tokens of any position here; the others get tokens that were not drawn, of probability 0.
    """
    distinct_M, ids, counts_S = (read(name).to(device) for name in ("distinct", "entry_ids", "entry_counts"))
    distinct_M, ids_S, vocab_size = distinct_M.long(), bytes_to_ids(ids), facts["vocab_size"]
    width = int(distinct_M.max())
    position_S = torch.repeat_interleave(torch.arange(len(distinct_M), device=device), distinct_M)
    place_S = torch.arange(len(ids_S), device=device) - (distinct_M.cumsum(0) - distinct_M)[position_S]
    ids_MK = _not_among(ids_S, position_S, len(distinct_M), width, min(2 * width, vocab_size))
    ids_MK[position_S, place_S] = ids_S
    log_probs_MK = torch.full(ids_MK.shape, -torch.inf, device=device)
    log_probs_MK[position_S, place_S] = counts_S.float().log() - math.log(facts["draws"])
    tail_M = None if width == vocab_size else torch.full((len(distinct_M),), -torch.inf, device=device)
    return TopK(ids_MK, log_probs_MK, 1.0, tail_M)


def _not_among(ids_S: Tensor, position_S: Tensor, positions: int, width: int, candidates: int) -> Tensor:
    """``[positions, width]`` low ids; from the column on that is the number of a position's drawn ids S, none of those.

    Its left columns are for the drawn ids, which the caller writes there.
    """
    taken = torch.zeros(positions, candidates, dtype=torch.bool, device=ids_S.device)
    low = ids_S < candidates
    taken[position_S[low], ids_S[low]] = True
    free_first = taken.to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    return free_first.flip(-1)


def ids_to_bytes(ids: Tensor) -> Tensor:
    """``[..., 3]`` uint8: token ids below 2^24, lowest byte first."""
    ids = ids.to(torch.int32)
    return torch.stack([(ids >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)


def bytes_to_ids(packed: Tensor) -> Tensor:
    """int64 token ids of ``ids_to_bytes``."""
    low, middle, high = packed.long().unbind(-1)
    return low | (middle << 8) | (high << 16)
