"""Several teachers as one: the weighted mean of their logits (BabyLlama-2, arXiv 2409.17312) or of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.models.internals import Watch, Watched
from daekit.protocol import Batch, Signal, Teacher, Voice
from daekit.teachers.sharding import Sharding, shard_teacher


class EnsembleTeacher:
    """A weighted mean of teachers; heads may differ in width and hidden size, the vocabulary is shared.

    Members may be routed teachers or ensembles (of the same kind of mean): positions are then split into the finest parts on
    which each member speaks with one signal.

    Args:
        members: the teachers.
        weights: one per member, positive, sum 1; default: equal.
        average: what is averaged after the temperature, ``logits`` or ``probabilities``.

    Raises:
        UserError: weights that do not fit.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float] | None = None, average: str = "logits") -> None:
        self.members = list(members)
        self.weights = [1.0 / len(self.members) for _ in self.members] if weights is None else list(weights)
        self.average = average
        self._sharded = False
        if len(self.weights) != len(self.members) or abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) <= 0:
            raise UserError(
                f"weights: {self.weights} of {len(self.members)} teachers; give one positive weight per teacher, sum 1"
            )
        if average not in ("logits", "probabilities"):
            raise UserError(f"average: {average!r} is unknown; choose logits or probabilities")

    def signals(self, batch: Batch) -> list[Signal]:
        """The members' signals, averaged where they overlap."""
        per_member = [member.signals(batch) for member in self.members]
        for signal in (signal for signals in per_member for signal in signals):
            if signal.top_k is not None:
                raise UserError(
                    "an ensemble cannot hold a teacher that gives only its most likely tokens (top_k): their tails are not "
                    "known token by token, so there is no mean; use the model that they come from, or it alone"
                )
            if len(signal.voices) > 1 and signal.average != self.average:
                raise UserError(f"an ensemble that averages {self.average} cannot hold one that averages {signal.average}")
        together = [signals[0] for signals in per_member if len(signals) == 1]
        if len(together) == len(per_member) and all(_same_order(together[0], signal) for signal in together[1:]):
            return [Signal(together[0].positions_M, self._voices(together), self.average)]
        return self._split(per_member, int(batch.labels_N.numel()))

    def _split(self, per_member: list[list[Signal]], kept: int) -> list[Signal]:
        merged = []
        for combination in product(*per_member):
            common = _intersection([signal.positions_M for signal in combination], kept)
            if common.numel() or self._sharded:  # heads are gathered in one order on all ranks, whatever rows each has
                parts = [_restricted(signal, common, kept) for signal in combination]
                merged.append(Signal(common, self._voices(parts), self.average))
        return merged

    def _voices(self, signals: Sequence[Signal]) -> tuple[Voice, ...]:
        return tuple(
            replace(voice, weight=weight * voice.weight)
            for weight, signal in zip(self.weights, signals, strict=True)
            for voice in signal.voices
        )

    def watch(self, watch: Watch | None) -> list[Watched]:
        """Refused: a mean of distributions has one set of probabilities but no attention and no hidden states."""
        if watch is None:
            return []
        raise UserError(
            "an ensemble has no attention or hidden states of its own: attention_weight and hidden_weight need one teacher per "
            "row. Set them to 0, or choose one teacher."
        )

    def to(self, device: torch.device) -> EnsembleTeacher:
        """Move every member."""
        for member in self.members:
            member.to(device)
        return self

    def shard(self, sharding: Sharding) -> None:
        """Split every member; see ``ShardableTeacher``."""
        self._sharded = sharding.splits
        for member in self.members:
            shard_teacher(member, sharding)

    def identity(self) -> dict[str, object]:
        """The members' identities, their weights and the kind of mean."""
        return {
            "kind": "ensemble",
            "average": self.average,
            "weights": self.weights,
            "members": [member.identity() for member in self.members],
        }


def _same_order(a: Signal, b: Signal) -> bool:
    return torch.equal(a.positions_M, b.positions_M)


def _intersection(positions: list[Tensor], kept: int) -> Tensor:
    votes = torch.zeros(kept, dtype=torch.long, device=positions[0].device)
    for chosen in positions:
        votes[chosen] += 1
    return (votes == len(positions)).nonzero().flatten()


def _restricted(signal: Signal, common: Tensor, kept: int) -> Signal:
    """The signal at those of its positions that are ``common``, in their order."""
    where = torch.full((kept,), -1, device=common.device)
    where[signal.positions_M] = torch.arange(signal.positions_M.numel(), device=common.device)
    index = where[common]
    voices = tuple(replace(voice, hidden_MH=voice.hidden_MH[index]) for voice in signal.voices)
    return replace(signal, positions_M=common, voices=voices)
