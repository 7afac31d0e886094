"""One recipe that the planner's tests plan again and again, with changes."""

from __future__ import annotations

from pathlib import Path

from daekit.planning.machine import Machine
from daekit.planning.plan import Planner, StagePlan
from daekit.recipe import load_recipe_text

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/paper/*.yaml")])
RECIPE = """\
name: planned
output_dir: OUT
tokenizer: {train: {vocab_size: 500}}
sources: {text: {domain: general, path: builtin:chat}, shop: {domain: ecommerce, path: builtin:shop}}
stages:
  kd:
    type: kd
    student:
      config: &config
        {model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 6, num_attention_heads: 4}
    teacher:
      config:
        model_type: mixtral
        hidden_size: 96
        intermediate_size: 128
        num_hidden_layers: 3
        num_attention_heads: 4
        num_key_value_heads: 4
        num_local_experts: 4
    data: [text]
    trainer: {max_length: 64, per_device_train_batch_size: 2}
  dae:
    type: dae
    student: {config: *config}
    teachers: {ecommerce: "stage:kd"}
    data: {text: 0.5, shop: 0.5}
    trainer: {max_length: 64, per_device_train_batch_size: 2}
"""
# a recipe refuses an adapter on random weights
PATH = "stages.{}.student={{path: Qwen/Qwen2.5-0.5B, dtype: float32}}"
GPU = Machine(8 * 10**9)
CPU = Machine(8 * 10**9, gpu=False)
PLANNERS: dict[Machine, Planner] = {}


def plan(*overrides: str, machine: Machine = CPU, stage: str = "kd") -> StagePlan:
    planner = PLANNERS.setdefault(machine, Planner(machine))
    return planner.stage(load_recipe_text(RECIPE, "planned.yaml", overrides), stage)


def parts(*overrides: str, phase: str = "", machine: Machine = CPU, stage: str = "kd") -> dict[str, int]:
    """The parts at the peak, or in a named phase."""
    planner = PLANNERS.setdefault(machine, Planner(machine))
    memory = planner._memory(load_recipe_text(RECIPE, "planned.yaml", overrides), stage)
    return next(each.parts for each in memory.phases() if each.phase == (phase or memory.peak().phase))
