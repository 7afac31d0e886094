"""What a recipe needs before it runs: memory by part, what fits, operations of a step. No weights are loaded."""

from daekit.planning.announcement import announce
from daekit.planning.machine import Machine, machine_of, this_machine
from daekit.planning.plan import Planner, plan_recipe
from daekit.planning.show import format_plan, plan_json

__all__ = [
    "Machine",
    "Planner",
    "announce",
    "format_plan",
    "machine_of",
    "plan_json",
    "plan_recipe",
    "this_machine",
]
