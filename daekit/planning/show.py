"""Shows a plan as text and as JSON."""

from __future__ import annotations

from typing import Any

from daekit.planning.machine import Machine
from daekit.planning.plan import Plan, StagePlan


def gigabytes(size: float) -> str:
    """``12.3 GB``, of 10^9 bytes."""
    return f"{size / 1e9:.{1 if size >= 1e9 else 2}f} GB"


def format_plan(plan: Plan, tflops: float | None = None) -> str:
    """The plan as text; with a rate in TFLOP/s also the time of a step."""
    return "\n\n".join(_format_stage(stage, plan.machine, tflops) for stage in plan.stages)


def plan_json(plan: Plan, tflops: float | None = None) -> dict[str, Any]:
    """The plan as plain values; sizes are in bytes."""
    machine = plan.machine
    return {
        "machine": {"memory": machine.memory, "gpu": machine.gpu, "count": machine.count, "engine": machine.engine},
        "stages": {stage.name: _stage_json(stage, tflops) for stage in plan.stages},
    }


def _stage_json(stage: StagePlan, tflops: float | None) -> dict[str, Any]:
    return {
        "parts": stage.memory.parts,
        "total": stage.memory.total,
        "phase": stage.memory.phase,
        "fits": stage.fits,
        "largest_per_device_train_batch_size": stage.largest_rows,
        "operations_per_step": stage.operations,
        "caches": {
            cache.teacher: {"bytes_per_loss_token": cache.token_bytes, "heads": cache.head_bytes, "weights": cache.making}
            for cache in stage.caches
        },
        "seconds_per_step": stage.operations / (tflops * 1e12) if tflops else None,
        "changes": [override for change in stage.changes for override in change.overrides],
        "gpus_with_fsdp2": stage.shards,
    }


def _format_stage(stage: StagePlan, machine: Machine, tflops: float | None) -> str:
    training, device = stage.training, "GPU" if machine.gpu else "CPU"
    checkpointing = "gradient checkpointing" if training.checkpointing else "no gradient checkpointing"
    engine = "" if machine.engine == "none" else f", {machine.engine}"
    lines = [
        f"[{stage.name}] per {device} of {machine.count}{engine}: {training.rows} rows of {training.length:,} tokens, "
        f"{training.accumulation} micro-batches a step, {checkpointing}, {training.optim}"
    ]
    for part, size in stage.memory.parts.items():
        lines.append(f"    {part:<28}{gigabytes(size):>10}")
    verdict = "fits" if stage.fits else "does not fit"
    lines.append(
        f"    {'planned peak':<28}{gigabytes(stage.memory.total):>10}  of {gigabytes(machine.memory)}: {verdict} "
        f"(highest: {stage.memory.phase})"
    )
    if stage.largest_rows is not None:
        largest = stage.largest_rows or "none: not even 1"
        lines.append(f"    largest per_device_train_batch_size that fits: {largest}")
    lines.append(f"    {stage.operations / 1e12:,.1f} TFLOP per step and {device}" + _time(stage, tflops))
    for cache in stage.caches:
        heads = f" + {gigabytes(cache.head_bytes)}" if cache.head_bytes else ""
        lines.append(
            f"    {cache.teacher}: read from a cache, {cache.token_bytes:,} bytes per loss token on the disk{heads}; "
            f"{gigabytes(cache.making)} of weights in memory while it is made, before the student is loaded"
        )
    if not stage.fits and stage.largest_rows is not None:
        lines += _advice(stage)
    return "\n".join(lines)


def _time(stage: StagePlan, tflops: float | None) -> str:
    return f": {stage.operations / (tflops * 1e12):,.1f} s at {tflops:g} TFLOP/s" if tflops else ""


def _advice(stage: StagePlan) -> list[str]:
    lines = []
    if stage.changes:
        lines.append(f"    it would fit with {' and '.join(change.what for change in stage.changes)}:")
        lines.append("        " + " ".join(override for change in stage.changes for override in change.overrides))
    if stage.shards is not None:
        start = "or" if stage.changes else "it would fit"
        lines.append(f"    {start} split over {stage.shards} GPUs: --gpus {stage.shards} --engine fsdp2")
    return lines or ["    no change that is known here makes it fit: take smaller models, shorter rows or larger devices"]
