"""The host's memory while the processes of one machine load the models of a stage, before the first step."""

from __future__ import annotations

from daekit.planning.machine import Machine
from daekit.planning.memory import StageMemory
from daekit.planning.meta_model import MetaModel

# A process beside others of its kind, with which it shares its libraries, once it has read the rows: 0.44 to 0.50 GB measured.
# With a GPU comes the host's part of CUDA, which nobody has measured here.
_PROCESS, _GPU_PROCESS = 500_000_000, 1_000_000_000


def host_bytes(memory: StageMemory) -> int:
    """Bytes of all processes of a machine together, at the moment of loading that needs most.

    What each rank reads whole lies there once per rank, and the files of the model that is being read once more. Of what FSDP2
    and ZeRO-3 split first each rank holds its part (on a GPU: none) and what it has in hand: two layers that are gathered to
    look at the model (ZeRO-3: a parameter, as it is made and gathered; on a GPU: the parts of one layer). On a CPU DeepSpeed's
    optimizer is there before the first step.
    """
    machine, count = memory.machine, memory.machine.count
    models = [(model.meta, model.in_parts) for model in memory.models.frozen if not model.adapter]
    models.append((memory.student, memory.models.student_in_parts))  # split last
    parts = [meta for meta, in_parts in models if in_parts and _splits(meta, machine)]
    whole = [meta for meta, in_parts in models if not (in_parts and _splits(meta, machine))]
    everything = sum(map(_stored, whole))
    peak = everything + max(map(_stored, whole), default=0) // count
    held = everything
    for meta in parts:
        units = [[p] for p in meta.parameters()] if machine.engine == "zero3" else meta.layers
        largest = max(sum(p.bytes for p in unit) for unit in units)
        if not machine.gpu:
            held += memory.split_bytes(meta)
        peak = max(peak, held + (largest // count if machine.gpu else 2 * largest))
    if machine.engine == "zero3" and not machine.gpu:
        peak = max(peak, held + memory.deepspeed_start)
    return count * (peak + (_GPU_PROCESS if machine.gpu else _PROCESS))


def _splits(meta: MetaModel, machine: Machine) -> bool:
    """Whether ranks read parts here: not where FSDP2 would leave one of them without an expert."""
    config = meta.spec.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or machine.count
    return machine.engine == "zero3" or (machine.engine == "fsdp2" and experts >= machine.count)


def _stored(meta: MetaModel) -> int:
    return sum(p.bytes for p in meta.parameters() if not p.adapter)
