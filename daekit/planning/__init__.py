"""What a recipe needs before it runs: memory by part, what fits, operations of a step. Nothing is loaded."""

from daekit.planning.here import announce, machine_of, this_machine
from daekit.planning.plan import Plan, Planner, StagePlan, plan_recipe
from daekit.planning.show import format_plan, plan_json
from daekit.planning.training import ENGINES, Machine

__all__ = [
    "ENGINES",
    "Machine",
    "Plan",
    "Planner",
    "StagePlan",
    "announce",
    "format_plan",
    "machine_of",
    "plan_json",
    "plan_recipe",
    "this_machine",
]
