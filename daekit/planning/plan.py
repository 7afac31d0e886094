"""A recipe's plan: memory of each stage, what fits, what it costs in operations, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daekit.planning.memory import Memory, StageMemory
from daekit.planning.models import ModelPlanner
from daekit.planning.training import Machine, training_of
from daekit.recipe.schema import Recipe


@dataclass(frozen=True)
class StagePlan:
    """What is known of one stage before it runs."""

    name: str
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """The plans of a recipe's stages."""

    stages: tuple[StagePlan, ...]


def plan_recipe(recipe: Recipe, machine: Machine, only: Sequence[str] = ()) -> Plan:
    planner = ModelPlanner()
    plans = []
    for name in only or recipe.stages:
        models = planner.stage(recipe, name)
        training = training_of(recipe.stages[name], name, machine)
        plans.append(StagePlan(name, StageMemory(recipe.stages[name], models, training, machine).peak()))
    return Plan(tuple(plans))
