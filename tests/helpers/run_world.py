"""A recipe of one small training for the tests of a run's life: kept, extended, killed, signalled, locked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from daekit.cli import main
from daekit.runtime.signals import SaveOnSignal

RECIPE = """
name: small
output_dir: OUT
tokenizer: {train: {vocab_size: 300, kind: words}}
sources:
  skills: {domain: general, path: "builtin:skills", validation: "builtin:skills", limit: 20, validation_limit: 4}
stages:
  base:
    type: sft
    student: {config: {model_type: mistral, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1}}
    data: [skills]
    trainer: {max_steps: 7, per_device_train_batch_size: 4, logging_steps: 2, save_steps: 100, learning_rate: 0.01,
              lr_scheduler_type: constant, gradient_checkpointing: false}
"""
TIMES = ("runtime", "per_second")


def train(folder: Path, *arguments: str) -> int:
    """``daekit train`` of the recipe in ``folder/run``; five steps are an epoch. Returns the exit status."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        path.write_text(RECIPE.replace("OUT", json.dumps(str(folder / "run"))))
    return main(["train", str(path), *arguments])


def stage_of(folder: Path) -> Path:
    """The folder of the stage."""
    return folder / "run" / "stages" / "base"


def weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights."""
    return load_file(stage_of(folder) / "model" / "model.safetensors")


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    entries = json.loads((stage_of(folder) / "stage.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in entries]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights, to the bit, and equal logs."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history(one) == history(other) != []


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints."""
    return sorted(path.name for path in stage_of(folder).glob("checkpoint-*"))


def during_step(step: int, action: Callable[[], object]) -> None:
    """In this process, from now on: do something when a training is about to take its ``step``-th step."""

    def on_step_begin(self: SaveOnSignal, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step - 1:
            action()

    SaveOnSignal.on_step_begin = on_step_begin  # type: ignore[method-assign]
