"""Shows a plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from daekit.planning.caches import CachePlan
from daekit.planning.generation import WritingPlan
from daekit.planning.machine import Machine
from daekit.planning.plan import Plan, StagePlan


def gigabytes(size: float) -> str:
    """``12.3 GB``, of 10^9 bytes."""
    return f"{size / 1e9:.{1 if size >= 1e9 else 2}f} GB"


def format_plan(plan: Plan, tflops: float | None = None) -> str:
    """The plan as text; with a rate in TFLOP/s also the time of a step."""
    parts = [_format_generated(each, tflops) for each in plan.generated]
    parts += [_format_stage(stage, plan.machine, tflops) for stage in plan.stages]
    return "\n\n".join([*parts, *([_format_answers(plan.answers, tflops)] if plan.answers else [])])


def plan_json(plan: Plan, tflops: float | None = None) -> dict[str, Any]:
    """The plan as plain values; sizes are in bytes."""
    machine = plan.machine
    return {
        "machine": {"memory": machine.memory, "gpu": machine.gpu, "count": machine.count, "engine": machine.engine},
        "generated": [_writing_json(each, tflops) for each in plan.generated],
        "answers": plan.answers and _writing_json(plan.answers, tflops),
        "stages": {stage.name: _stage_json(stage, tflops) for stage in plan.stages},
    }


def _stage_json(stage: StagePlan, tflops: float | None) -> dict[str, Any]:
    return {
        "parts": stage.memory.parts,
        "total": stage.memory.total,
        "phase": stage.memory.phase,
        "not_counted": list(stage.training.uncounted),
        "fits": stage.fits,
        "host_while_loading": stage.host,
        "largest_per_device_train_batch_size": stage.largest_rows,
        "operations_per_step": stage.operations,
        "caches": {cache.teacher: _cache_json(cache, tflops) for cache in stage.caches},
        "seconds_per_step": _seconds(stage.operations, tflops),
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
    lines += [_size(part, size) for part, size in stage.memory.parts.items()]
    verdict = f"{'fits' if stage.fits else 'does not fit'} (highest: {stage.memory.phase})"
    lines.append(_size("planned peak", stage.memory.total) + f"  of {gigabytes(machine.memory)}: {verdict}")
    if machine.count > 1:
        lines.append(_size("host while loading", stage.host) + f"  of a machine that runs all {machine.count} processes")
    if training.uncounted:
        lines.append(f"    planned as if without {' and '.join(training.uncounted)}, whose memory is not counted")
    if stage.largest_rows is not None:
        largest = stage.largest_rows or "none: not even 1"
        lines.append(f"    largest per_device_train_batch_size that fits: {largest}")
    lines.append(f"    {stage.operations / 1e12:,.1f} TFLOP per step and {device}" + _time(stage.operations, tflops))
    for cache in stage.caches:
        lines += _format_cache(cache, machine, tflops)
    if not stage.fits and stage.largest_rows is not None:
        lines += _advice(stage)
    return "\n".join(lines)


def _size(what: str, size: int) -> str:
    return f"    {what:<28}{gigabytes(size):>10}"


def _seconds(operations: float | None, tflops: float | None) -> float | None:
    return operations / (tflops * 1e12) if tflops and operations else None


def _time(operations: float, tflops: float | None) -> str:
    seconds = _seconds(operations, tflops)
    return "" if seconds is None else f": {seconds:,.1f} s at {tflops:g} TFLOP/s"


def _format_cache(cache: CachePlan, machine: Machine, tflops: float | None) -> list[str]:
    counts, per_token, work = cache.counts, f"{cache.token_bytes:,} bytes per loss token", ""
    if cache.drawn is not None:
        between = "between {} and {}".format(*cache.drawn)
        per_token = f"about {per_token}, {between} by how many of the draws differ, which depends on the teacher"
    if counts is None or cache.size is None or cache.operations is None:
        lines = [f"    {cache.teacher}: read from a cache of {per_token}; its size is not known: {cache.unread}"]
    else:
        how = f"{counts.rows:,} rows, {counts.loss_tokens:,} loss tokens, {per_token}"
        if counts.estimated:
            how = f"at most: as if each of {counts.rows:,} rows had max_length tokens, for {counts.estimated}; {per_token}"
        lines = [f"    {cache.teacher}: read from a cache of {gigabytes(cache.size)} on the disk ({how})"]
        if cache.operations:  # a server does its own
            work = f", {cache.operations / 1e12:,.1f} TFLOP" + _time(cache.operations / machine.count, tflops)
    fits = "" if cache.making.total <= machine.memory else ", which does not fit"
    lines.append(f"        made before the student is loaded, with {gigabytes(cache.making.total)} of memory{fits}{work}")
    if cache.reported:
        weights = f"{gigabytes(cache.making.parts.get('teacher weights', 0))} of weights"
        lines.append(f"        the report loads it, too ({weights}), for KL on validation rows, which no cache holds")
    return lines


def _format_answers(answers: WritingPlan, tflops: float | None) -> str:
    lines = [f"[{answers.what}] {len(answers.models)} models, {answers.new_tokens:,} tokens each at most"]
    lines.append(_keys_and_values(answers))
    if answers.rows is not None and answers.operations is not None:
        tokens = len(answers.models) * answers.rows * answers.new_tokens
        work = f"{answers.operations / 1e12:,.1f} TFLOP" + _time(answers.operations, tflops)
        lines.append(f"    at most {answers.rows:,} rows each, {tokens:,} tokens, {work}")
    return "\n".join(lines)


def _format_generated(plan: WritingPlan, tflops: float | None) -> str:
    lines = [f"[{plan.what}] {plan.models[0]} writes {plan.new_tokens:,} tokens a row at most"]
    if plan.key_value_bytes is not None:  # None of an endpoint, and of a model whose shape is not known
        lines.append(_keys_and_values(plan))
    if plan.rows is None:
        lines.append(f"    how many rows is not known: {plan.unread}")
        return "\n".join(lines)
    work = "" if plan.operations is None else f", {plan.operations / 1e12:,.1f} TFLOP" + _time(plan.operations, tflops)
    more = "" if plan.attempts is None else f"; attempts that are no row come on top, to {plan.attempts:,} together at most"
    lines.append(f"    {plan.rows:,} rows, {plan.rows * plan.new_tokens:,} tokens at most{work}{more}")
    if plan.unread:
        lines.append(f"    with prompts of max_length tokens, for {plan.unread}")
    return "\n".join(lines)


def _keys_and_values(plan: WritingPlan) -> str:
    return _size("cached keys and values", plan.key_value_bytes or 0) + "  of one batch at most"


def _writing_json(plan: WritingPlan, tflops: float | None) -> dict[str, Any]:
    return asdict(plan) | {"seconds": _seconds(plan.operations, tflops)}


def _cache_json(cache: CachePlan, tflops: float | None) -> dict[str, Any]:
    return {
        "bytes_per_loss_token": cache.token_bytes,
        "bytes_per_loss_token_between": cache.drawn,
        "heads": cache.head_bytes,
        "bytes": cache.size,
        "rows": cache.counts and asdict(cache.counts),
        "making": {"parts": cache.making.parts, "total": cache.making.total},
        "loaded_by_report": cache.reported,
        "operations": cache.operations,
        "seconds": _seconds(cache.operations, tflops),
    }


def _advice(stage: StagePlan) -> list[str]:
    lines = []
    if stage.changes:
        lines.append(f"    it would fit with {' and '.join(change.what for change in stage.changes)}:")
        lines.append("        " + " ".join(override for change in stage.changes for override in change.overrides))
    if stage.shards is not None:
        start = "or" if stage.changes else "it would fit"
        lines.append(f"    {start} split over {stage.shards} GPUs: --gpus {stage.shards} --engine fsdp2")
    return lines or ["    no change that is known here makes it fit: take smaller models, shorter rows or larger devices"]
