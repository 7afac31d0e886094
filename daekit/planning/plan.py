"""The plan of a recipe: the memory and operations of each stage, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from daekit.errors import UserError
from daekit.planning.advice import Change, changes, cheapest, largest_rows
from daekit.planning.caches import CachePlan, StageRows, cache_plans
from daekit.planning.generation import PromptFacts, WritingPlan, answers_plan, generated_plans
from daekit.planning.machine import Machine
from daekit.planning.memory import Memory, StageMemory
from daekit.planning.meta_model import MetaModel
from daekit.planning.models import ModelPlanner
from daekit.planning.operations import step_operations
from daekit.planning.training import Training, training_of
from daekit.recipe.schema import Recipe
from daekit.recipe.validation import dotted

_SHARDS = (2, 4, 8, 16, 32)
# A process beside others of its kind, with which it shares its libraries, once it has read the rows: 0.44 to 0.50 GB measured.
# With a GPU comes the host's part of CUDA, which nobody has measured here.
_PROCESS, _GPU_PROCESS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class StagePlan:
    """What is known of one stage before it runs.

    Attributes:
        name: The stage's name.
        training: Its options.
        memory: The phase that needs most memory, per device.
        static: Bytes that it needs however short its rows are: weights, gradients and optimizer, without teachers that may be
            put elsewhere.
        host: Bytes of the host that the processes of one machine take together while they load; all are on one machine here.
        fits: Whether the peak is within the device's memory.
        operations: Floating-point operations of one optimizer step on one device.
        caches: What the caches of its teachers take.
        largest_rows: The largest ``per_device_train_batch_size`` that fits; None if it was not asked for.
        changes: The cheapest changes that make it fit, where it does not.
        shards: The number of devices over which FSDP2 would make it fit, where it does not.
    """

    name: str
    training: Training
    memory: Memory
    static: int
    host: int
    fits: bool
    operations: float
    caches: tuple[CachePlan, ...] = ()
    largest_rows: int | None = None
    changes: tuple[Change, ...] = ()
    shards: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plans of a recipe's stages on a machine, and of what models write before, between and after them."""

    machine: Machine
    stages: tuple[StagePlan, ...]
    answers: WritingPlan | None = None
    generated: tuple[WritingPlan, ...] = ()


Reload = Callable[[Sequence[str]], Recipe]


class Planner:
    """Plans stages of recipes on one machine, and makes each model once."""

    def __init__(self, machine: Machine, models: ModelPlanner | None = None) -> None:
        self.machine, self.models = machine, models or ModelPlanner(machine.gpu)

    def _memory(self, recipe: Recipe, name: str) -> StageMemory:
        stage = recipe.stages[name]
        return StageMemory(stage, self.models.stage(recipe, name), training_of(stage, name, self.machine), self.machine)

    def stage(self, recipe: Recipe, name: str, rows: StageRows | None = None, reload: Reload | None = None) -> StagePlan:
        """The plan of a stage; ``rows`` and ``reload`` as in ``plan_recipe``.

        Raises:
            UserError: A model is not known or cannot be planned, the optimizer is unknown, or a student in 8 bits would have to
                be split.
        """
        memory, machine = self._memory(recipe, name), self.machine
        if memory.student.spec.quantization == "8bit" and machine.shards("weights") > 1:
            raise UserError(
                f"student.quantization=8bit: {machine.engine} cannot split weights of 8 bits; plan with "
                "--engine ddp or zero2, where each device holds them whole, or without quantization"
            )
        peak = memory.peak()
        static = sum(memory.static.values()) - machine.overhead
        if memory.training.accumulation == 1:
            static += memory.gradients
        static -= sum(model.bytes for model in memory.models.frozen if model.movable)
        fits, host = peak.total <= machine.memory, host_bytes(memory)
        caches = cache_plans(memory, rows, {dotted(key) for key in recipe.measured_teachers(name)})
        plan = StagePlan(name, memory.training, peak, static, host, fits, step_operations(memory), caches)
        if reload is None:
            return plan
        largest = largest_rows(lambda rows: memory.of_rows(rows).peak().total, machine.memory, memory.training.rows)
        plan = replace(plan, largest_rows=largest)
        if fits:
            return plan
        options = changes(memory.stage, name, memory.training, machine.gpu)
        chosen = cheapest(options, lambda overrides: self.stage(reload(overrides), name).fits)
        return replace(plan, changes=chosen, shards=self._shards(recipe, name))

    def _shards(self, recipe: Recipe, name: str) -> int | None:
        """The smallest number of devices on which it fits with FSDP2; None for a student in 8 bits, which is not split."""
        student, machine = recipe.stages[name].student, self.machine
        if not machine.gpu or machine.engine in ("fsdp2", "zero3") or (student and student.quantization == "8bit"):
            return None
        for count in _SHARDS:
            split = Planner(replace(machine, count=count, engine="fsdp2"), self.models)
            if count >= machine.count and split.stage(recipe, name).fits:
                return count
        return None


def plan_recipe(
    recipe: Recipe,
    machine: Machine,
    reload: Reload | None = None,
    only: Sequence[str] = (),
    rows: StageRows | None = None,
    prompts: PromptFacts | None = None,
) -> Plan:
    """The plan of a recipe, before anything of it is loaded.

    Args:
        recipe: A resolved recipe.
        machine: Where it is to run.
        reload: Loads the recipe with further overrides; None for a plan without advice.
        only: The stages to plan, and nothing that is written beside them (default: all).
        rows: Reads the tokenised rows of a stage, of those with caches only; None: caches are planned without.
        prompts: Reads the prompts of a generated source; None: they are taken to be ``max_length`` tokens long.

    Raises:
        UserError: See ``Planner.stage``; the message names the stage.
    """
    planner, plans = Planner(machine), []
    for name in only or recipe.stages:
        try:
            plans.append(planner.stage(recipe, name, rows, reload))
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from error
    if only:
        return Plan(machine, tuple(plans))
    generated = generated_plans(recipe, planner.models, prompts)
    return Plan(machine, tuple(plans), answers_plan(recipe, planner.models), generated)


def host_bytes(memory: StageMemory) -> int:
    """Bytes of all processes of a machine together, at the moment of loading, before the first step, that needs most.

    What each rank reads whole lies there once per rank, and the files of the model that is being read once more. Of what FSDP2
    and ZeRO-3 split first each rank holds its part (on a GPU: none) and what it has in hand: two layers that are gathered to
    look at the model (ZeRO-3: a parameter, as it is made and gathered; on a GPU: the parts of one layer). On a CPU DeepSpeed's
    optimizer is there before the first step.
    """
    machine, count = memory.machine, memory.machine.count
    models = [(model.meta, model.in_parts) for model in memory.models.frozen if not model.adapter]
    models.append((memory.student, memory.models.student_in_parts))  # split last
    parts = [meta for meta, in_parts in models if in_parts and _splits(meta, machine)]
    whole = [meta.weight_bytes for meta, in_parts in models if not (in_parts and _splits(meta, machine))]
    held = sum(whole)
    peak = held + max(whole, default=0) // count
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
