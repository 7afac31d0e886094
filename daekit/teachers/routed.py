"""Each row follows the teacher of its domain; one frozen forward per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from daekit.errors import UserError, nearest
from daekit.models.adapters import adapter_parameters
from daekit.models.backbone import base_of
from daekit.models.features import require_features
from daekit.protocol import Batch, FeatureLayers, FeatureSpec, Teacher, TeacherOutput
from daekit.teachers.adapter import AdapterTeacher, current_outputs
from daekit.teachers.sharding import Sharding, one_token, shard_teacher

_BARE_BASE = "__base__"  # PEFT's name for no adapter
# the layers of peft.tuners.lora that take adapter_names; others raise, or would not look at it
_MIXING_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


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

        Teachers that are adapters of one model run in one forward (PEFT's ``adapter_names``) where that is the same.

        Raises:
            UserError: a row's domain has no teacher.
        """
        for domain in set(batch.domains) - set(self.routes):
            raise unknown_domain(domain, self.routes)
        rows_of = {teacher: batch.rows_of(domains) for teacher, domains in self._domains.items()}
        outputs: list[TeacherOutput] = []
        if self._sharding is None:
            wanted = {teacher: rows for teacher, rows in rows_of.items() if rows}
            outputs, rows_of = _adapters_together(wanted, batch, capture)
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


def _adapters_together(
    rows_of: Mapping[Teacher, list[int]], batch: Batch, capture: FeatureSpec | None
) -> tuple[list[TeacherOutput], dict[Teacher, list[int]]]:
    """Run those teachers that are adapters of one model and can be mixed in one forward per model.

    Rows of a packed batch share a sequence, and PEFT has one adapter per sequence: there no teacher is run.

    Args:
        rows_of: teacher -> its rows of the batch.
        batch: the outputs count its positions.
        capture: see ``Teacher.outputs``.

    Returns:
        Their outputs, and the rows of the teachers that are left.
    """
    rest = dict(rows_of)
    outputs: list[TeacherOutput] = []
    if len(batch.domains) != batch.labels_BT.shape[0]:
        return outputs, rest
    by_model: dict[int, list[AdapterTeacher]] = {}
    for teacher in rows_of:
        if isinstance(teacher, AdapterTeacher):
            by_model.setdefault(id(teacher.model), []).append(teacher)
    for teachers in by_model.values():
        if len(teachers) > 1 and _can_mix(teachers[0].model, [teacher.adapter for teacher in teachers]):
            outputs += _one_forward({teacher: rest.pop(teacher) for teacher in teachers}, batch, capture)
    return outputs, rest


def _one_forward(rows_of: Mapping[AdapterTeacher, list[int]], batch: Batch, capture: FeatureSpec | None) -> list[TeacherOutput]:
    """One output for the rows of all these teachers, each row through its teacher's adapter."""
    adapter_of = {row: teacher.adapter or _BARE_BASE for teacher, rows in rows_of.items() for row in rows}
    rows = sorted(adapter_of)
    part = batch.select(rows)
    part = replace(part, inputs=part.inputs | {"adapter_names": [adapter_of[row] for row in rows]})
    first, positions_M = next(iter(rows_of)), batch.positions_of(rows)
    outputs = current_outputs(first.model, part, first.vocab_size, capture)
    return [replace(output, positions_M=positions_M[output.positions_M]) for output in outputs]


def _can_mix(model: PeftModel, adapters: Sequence[str | None]) -> bool:
    """Whether one forward with ``adapter_names`` is the same as one forward per adapter.

    Not so with DoRA and other variants of LoRA, adapted parameters that are no modules, modules saved whole (their heads
    differ), merged or switched-off layers, adapters of several dtypes (bitsandbytes' layers would round one as another), and
    float32 adapters on a bfloat16 layer without autocast (their output would be rounded before it is added, not after).
    """
    if not model.has_active_enabled_adapter:  # PEFT would not look at adapter_names
        return False
    dtypes = {p.dtype for name in adapters if name is not None for p in adapter_parameters(model, name).values()}
    if len(dtypes) > 1:
        return False
    rounded_alike = torch.is_autocast_enabled(base_of(model).device.type)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if isinstance(module, BaseTunerLayer):
            if type(module).__name__ not in _MIXING_LAYERS or module.merged:
                return False
            if any(name in module.lora_variant for name in adapters):
                return False
            if type(module).__name__ == "Linear" and not rounded_alike and dtypes - {module.weight.dtype}:
                return False
    return True
