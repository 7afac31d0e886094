"""Each row follows the teacher of its domain; one frozen forward per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from daekit.errors import UserError, nearest
from daekit.models.features import require_features
from daekit.protocol import Batch, FeatureLayers, FeatureSpec, Teacher, TeacherOutput
from daekit.teachers.sharding import Sharding, one_token, shard_teacher
from daekit.teachers.together import adapters_together


class RoutedTeacher:
    """Gives each teacher only the rows of its domains.

    Where teachers are split over ranks, a rank without rows for one that runs elsewhere runs it on one token, and gets an
    output for no position.

    Args:
        routes: domain -> teacher. One object under several domains runs once, on the rows of all of them.
    """

    def __init__(self, routes: Mapping[str, Teacher]) -> None:
        self.routes = dict(routes)
        self._domains: dict[Teacher, list[str]] = {}
        for domain, teacher in self.routes.items():
            self._domains.setdefault(teacher, []).append(domain)
        self._sharding: Sharding | None = None

    def parts(self) -> list[tuple[Teacher, str | None]]:
        """See ``CompositeTeacher``."""
        return [(teacher, domain) for domain, teacher in self.routes.items()]

    def with_parts(self, change: Callable[[Teacher], Teacher]) -> RoutedTeacher:
        """See ``CompositeTeacher``."""
        changed = {teacher: change(teacher) for teacher in self._domains}
        return RoutedTeacher({domain: changed[teacher] for domain, teacher in self.routes.items()})

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """The outputs of all teachers that have rows, with positions counted in the whole batch.

        Teachers that are adapters of one model run in one forward where that is the same (see ``together.py``).

        Raises:
            UserError: a row's domain has no teacher.
        """
        for domain in set(batch.domains) - set(self.routes):
            raise unknown_domain(domain, self.routes)
        rows_of = {teacher: batch.rows_of(domains) for teacher, domains in self._domains.items()}
        outputs: list[TeacherOutput] = []
        if self._sharding is None:
            wanted = {teacher: rows for teacher, rows in rows_of.items() if rows}
            outputs, rows_of = adapters_together(wanted, batch, capture)
        else:  # one by one, in the same order on all ranks
            runs = self._sharding.somewhere([bool(rows) for rows in rows_of.values()])
            rows_of = {teacher: rows for (teacher, rows), here in zip(rows_of.items(), runs, strict=True) if here}
        for teacher, rows in rows_of.items():
            positions_M = batch.positions_of(rows)
            part = batch.select(rows) if rows else one_token(batch, self._domains[teacher][0])
            for output in teacher.outputs(part, capture):
                outputs.append(replace(output, positions_M=positions_M[output.positions_M]))
        return outputs

    def feature_layers(self, spec: FeatureSpec) -> list[FeatureLayers]:
        """See ``FeatureTeacher``; the layers of every teacher."""
        return [layers for teacher in self._domains for layers in require_features(teacher).feature_layers(spec)]

    def to(self, device: torch.device) -> RoutedTeacher:
        """Move every teacher."""
        for teacher in self._domains:
            teacher.to(device)
        return self

    def shard(self, sharding: Sharding) -> None:
        """Split every teacher; see ``ShardableTeacher``."""
        self._sharding = sharding if sharding.splits else None
        for teacher in self._domains:
            shard_teacher(teacher, sharding)

    def identity(self) -> dict[str, object]:
        """The identity of the teacher of every domain."""
        return {domain: teacher.identity() for domain, teacher in sorted(self.routes.items())}


def unknown_domain(domain: str, routes: Mapping[str, object]) -> UserError:
    """The error for a domain without a teacher; it names the nearest, because most are typing errors."""
    return UserError(
        f"domain {domain!r} has rows but no teacher (teachers and reference cover: {', '.join(sorted(routes))}). Give it a "
        f"teacher, or name it in reference_domains to follow the reference{nearest(domain, routes)}"
    )
