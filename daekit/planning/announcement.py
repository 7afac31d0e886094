"""What `daekit train` says of memory before it loads anything, and the runs that it refuses."""

from __future__ import annotations

from pathlib import Path

from daekit.environment import rank
from daekit.errors import UserError
from daekit.planning.machine import this_machine
from daekit.planning.plan import Reload, plan_recipe
from daekit.planning.show import format_plan, gigabytes
from daekit.recipe.schema import Recipe

# the planned static memory is less than 10% off the measured one (benchmarks/results), so that a refusal is certain
_CERTAIN = 0.9


def announce(recipe: Recipe, reload: Reload) -> None:
    """Print the planned peak of every stage that is not complete, before anything is loaded.

    A model that the planner does not know stops no run: one line says so.

    Raises:
        UserError: Weights, gradients and optimizer alone are larger than the machine's memory; the message holds the plan.
    """
    for name, spec in recipe.stages.items():
        if (Path(recipe.output_dir) / "stages" / name / "stage.json").is_file():
            continue
        machine = this_machine(cpu=bool(spec.trainer.get("use_cpu", False)))
        try:
            (stage,) = plan_recipe(recipe, machine, only=[name]).stages
        except Exception as error:  # a mistake of the planner must stop no run
            _say(f"[{name}] no plan of its memory: {error}")
            continue
        peak, memory = stage.memory.total, machine.memory
        if stage.static * _CERTAIN > memory:
            plan = plan_recipe(recipe, machine, reload, only=[name])
            raise UserError(
                f"stages.{name}: too large for this machine: its weights, gradients and optimizer alone take "
                f"{gigabytes(stage.static)} of {gigabytes(memory)}. Nothing has been loaded.\n{format_plan(plan)}"
            )
        _say(f"[{name}] planned peak {gigabytes(peak)} of {gigabytes(memory)} (rows of {stage.training.length:,} tokens)")
        if peak > memory:
            _say(f"[{name}] warning: it may run out of memory where rows are that long; `daekit plan` says what would help")


def _say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)
