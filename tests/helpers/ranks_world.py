"""A training that is killed, and goes on, on one number of ranks or another, under one engine or another."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from daekit.models.sharded import whole
from daekit.trainers import checkpoint
from tests.helpers import tiny
from tests.helpers.processes import engine_environment, start_ranks, status_of
from tests.helpers.trainer_world import dae

UNEQUAL = ("runtime", "per_second", "rollout_rows_per_second", "epoch", "total_flos")
ROWS = 14  # of which a step takes 8: the last one of an epoch has 6, which two and four ranks fill


def build(student: str, folder: Path, **changes: Any) -> Any:
    """DAE with the student as its own reference; the script asks for 2 ranks x 2 rows x 2 micro-batches.

    Adam with a large epsilon, or a rounding of a gradient that is almost zero would change the direction of a step.
    """
    arguments: dict[str, Any] = dict(
        reference=None,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=3,  # a window that was begun before a checkpoint is logged after it
        max_steps=7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        adam_epsilon=1e-3,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        ce_weight=0.2,
        num_train_epochs=5,
    )
    if student == "on-policy":  # buffers from steps 0 and 3: a checkpoint falls into each
        arguments |= {"on_policy_fraction": 0.5, "max_new_tokens": 8, "rollout_buffer": 3, "rollout_temperature": 0.5}
    if student in ("lora", "dropout", "on-policy"):
        dropout = 0.2 if student == "dropout" else 0.0
        arguments["peft_config"] = LoraConfig(
            r=4, lora_dropout=dropout, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    model = tiny.model("mixtral" if student == "mixtral" else "mistral", seed=1).eval()
    return dae(folder, tiny.rows(ROWS), model, **(arguments | changes))


class KillAtStep(TrainerCallback):
    """SIGKILL, or another signal, after a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step, self.signal = step, signal.SIGKILL

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.signal)


def train(student: str, folder: Path, kill: TrainerCallback | None = None, **changes: Any) -> None:
    """Train to the end from the newest checkpoint; each rank writes its weights and its log."""
    logging.basicConfig(force=True)  # into the file of this process
    trainer = build(student, folder, **changes)
    if kill is not None:
        trainer.add_callback(kill)
    trainer.train(resume_from_checkpoint=checkpoint.newest(folder) is not None)
    named = sorted((name, each) for name, each in trainer.model.named_parameters() if each.requires_grad)
    weights = torch.cat([whole(each).detach().double().flatten() for _, each in named])
    history = [{k: v for k, v in entry.items() if not k.endswith(UNEQUAL)} for entry in trainer.state.log_history]
    facts = {"weights": weights, "history": history, "kind": trainer.accelerator.distributed_type.value}
    torch.save(facts, folder / f"result-{trainer.args.process_index}.pt")


def on_ranks(count: int, action: Callable[[], Any], folder: Path, engine: str = "ddp") -> list[int]:
    """Run ``action`` on so many ranks; their exit statuses. What they said lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"said-{count}-{rank}.txt" for rank in range(count)]
    return [status_of(each) for each in start_ranks(action, outputs, **engine_environment(engine) if count > 1 else {})]


def said(folder: Path) -> str:
    """What the ranks have printed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("said-*.txt")))


def results(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each rank has written."""
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(count)]
