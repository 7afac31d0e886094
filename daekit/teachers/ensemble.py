"""Several teachers as one: the weighted mean of their logits (BabyLlama-2, arXiv 2409.17312) or of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.protocol import Batch, FeatureLayers, FeatureSpec, Member, Teacher, TeacherOutput
from daekit.teachers.sharding import Sharding, shard_teacher


class EnsembleTeacher:
    """A weighted mean of teachers; heads may differ in width and hidden size, the vocabulary is shared.

    Members may be routed teachers or ensembles (of the same kind of mean): positions are then split into the finest parts
    that one output of each member covers.

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

    def parts(self) -> list[tuple[Teacher, str | None]]:
        """See ``CompositeTeacher``."""
        return [(member, None) for member in self.members]

    def with_parts(self, change: Callable[[Teacher], Teacher]) -> EnsembleTeacher:
        """See ``CompositeTeacher``."""
        return EnsembleTeacher([change(member) for member in self.members], self.weights, self.average)

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """The members' outputs, averaged where they overlap."""
        per_member = [member.outputs(batch) for member in self.members]
        for output in (output for outputs in per_member for output in outputs):
            if output.top_k is not None:
                raise UserError(
                    "an ensemble cannot hold a teacher that gives only its most likely tokens (top_k): their tails are not "
                    "known token by token, so there is no mean; use the model that they come from, or it alone"
                )
            if len(output.members) > 1 and output.average != self.average:
                raise UserError(f"an ensemble that averages {self.average} cannot hold one that averages {output.average}")
        merged, positions = [], batch.labels_N.numel()
        for combination in product(*per_member):
            common = _intersection([output.positions_M for output in combination], positions)
            # of an empty batch, too, there is an output; where ranks share the heads all gather them in one order
            if common.numel() or not positions or self._sharded:
                parts = [_restricted(output, common, positions) for output in combination]
                merged.append(TeacherOutput(common, self._weighted(parts), self.average))
        return merged

    def _weighted(self, outputs: Sequence[TeacherOutput]) -> tuple[Member, ...]:
        return tuple(
            replace(member, weight=weight * member.weight)
            for weight, output in zip(self.weights, outputs, strict=True)
            for member in output.members
        )

    def feature_layers(self, spec: FeatureSpec) -> list[FeatureLayers]:
        """Refused: a mean of distributions has one set of probabilities but no attention and no hidden states."""
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


def _intersection(covered: list[Tensor], positions: int) -> Tensor:
    """The positions that are in all of some sets of them."""
    if all(torch.equal(chosen, covered[0]) for chosen in covered[1:]):
        return covered[0]
    votes = torch.zeros(positions, dtype=torch.long, device=covered[0].device)
    for chosen in covered:
        votes[chosen] += 1
    return (votes == len(covered)).nonzero().flatten()


def _restricted(output: TeacherOutput, common: Tensor, positions: int) -> TeacherOutput:
    """The output at those of its positions that are ``common``, in their order; itself where they are all of them."""
    if torch.equal(output.positions_M, common):
        return output
    where = torch.full((positions,), -1, device=common.device)
    where[output.positions_M] = torch.arange(output.positions_M.numel(), device=common.device)
    return output.at(where[common])
