"""Rows of several adapters of one base in one forward (PEFT's ``adapter_names``), where that is the same as switching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from daekit.models.adapters import adapter_parameters
from daekit.models.backbone import base_of
from daekit.protocol import Batch, FeatureSpec, Teacher, TeacherOutput
from daekit.teachers.adapter import AdapterTeacher, current_outputs

_BARE_BASE = "__base__"  # PEFT's name for no adapter
# the layers of peft.tuners.lora that take adapter_names; others raise, or would not look at it
_MIXING_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


def adapters_together(
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
        if len(teachers) > 1 and can_mix(teachers[0].model, [teacher.adapter for teacher in teachers]):
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


def can_mix(model: PeftModel, adapters: Sequence[str | None]) -> bool:
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
