"""Where a training is, how fast, and how long it will take: a bar, and one line per log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState

from daekit.losses import DIVERGENCES
from daekit.progress import Progress, clock

_SHOWN = {"loss", "eval_loss", "ce", "kl", *DIVERGENCES, "attention_kl", "hidden_cosine", "hidden_mse", "rollout_ended"}


class ProgressCallback(TrainerCallback):
    """Shows the steps of a training and of its evaluations, on the main process.

    Whenever the trainer logs it prints ``[kd] step 120/600  loss 0.012  kl/shop 0.034  5,230 tokens/s (1,870 in the loss)
    0:42 left``. The first rate counts the tokens that the student reads, padding left out; the second those of them whose
    prediction is trained.

    Args:
        stage: name at the beginning of each line.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._training = Progress(f"[{stage}]", "steps")
        self._evaluation: Progress | None = None
        self._since = (0.0, 0, 0)  # time, step, tokens at the last line
        self._evaluated = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), state.global_step, -1 if state.global_step else 0)
        if state.is_world_process_zero:
            if state.global_step:
                self._training.say(f"[{self.stage}] resumed at step {state.global_step}/{state.max_steps}")
            self._training(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self._training(state.global_step, state.max_steps)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: DataLoader | None = None, **_: Any
    ) -> None:
        """Move the bar of the evaluation, which is made by its first batch."""
        if not state.is_world_process_zero or eval_dataloader is None or not hasattr(eval_dataloader.dataset, "__len__"):
            return
        if self._evaluation is None:
            self._evaluation, self._evaluated = Progress(f"[{self.stage}] evaluation", "batches"), 0
        self._evaluated += 1
        self._evaluation(self._evaluated, len(eval_dataloader))

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Take the bar of the evaluation away."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the bar away."""
        self._training.close()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Print one line."""
        if not state.is_world_process_zero or logs is None or "train_runtime" in logs:
            return
        parts = [f"[{self.stage}] step {state.global_step}/{state.max_steps}"]
        parts += [f"{key} {value:.4g}" for key, value in logs.items() if _is_shown(key)]
        if "num_tokens" in logs:
            parts += self._speed(state, logs)
        self._training.say("  ".join(parts))

    def _speed(self, state: TrainerState, logs: Mapping[str, Any]) -> list[str]:
        now, tokens = time.perf_counter(), int(logs["num_tokens"])
        then, step, tokens_then = self._since
        self._since = (now, state.global_step, tokens)
        seconds, steps = now - then, state.global_step - step
        if steps <= 0:
            return []
        left = f"{clock((state.max_steps - state.global_step) * seconds / steps)} left"
        if tokens_then < 0:  # resumed in the middle of a window
            return [left]
        in_loss = sum(value for key, value in logs.items() if key.startswith(("tokens/", "tokens_on_policy/")))
        return [f"{(tokens - tokens_then) / seconds:,.0f} tokens/s ({in_loss / seconds:,.0f} in the loss)", left]


def _is_shown(key: str) -> bool:
    """The loss, and its terms per domain."""
    term, _, domain = key.removeprefix("eval_").partition("/")
    return key in ("loss", "eval_loss") or (bool(domain) and term.removesuffix("_on_policy") in _SHOWN)
