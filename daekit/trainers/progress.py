"""One line per log: where a run is, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daekit.losses import DIVERGENCES

_SHOWN = {"loss", "eval_loss", "ce", "kl", *DIVERGENCES, "attention_kl", "hidden_cosine", "hidden_mse"}


class ProgressCallback(TrainerCallback):
    """Prints ``[stage] step 120/600  loss 0.012  kl/shop 0.034  5,230 tokens/s  0:42 left`` whenever the trainer logs.

    Args:
        stage: name at the beginning of each line.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._since = (0.0, 0, 0)  # time, step, tokens at the last line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._since = (time.perf_counter(), state.global_step, -1)
        if state.is_world_process_zero and state.global_step:
            print(f"[{self.stage}] resumed at step {state.global_step}/{state.max_steps}", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print one line."""
        if not state.is_world_process_zero or logs is None or "train_runtime" in logs:
            return
        parts = [f"[{self.stage}] step {state.global_step}/{state.max_steps}"]
        parts += [f"{key} {value:.4g}" for key, value in logs.items() if _is_shown(key)]
        if "num_tokens" in logs:
            parts += self._speed(state, int(logs["num_tokens"]))
        print("  ".join(parts), flush=True)

    def _speed(self, state: TrainerState, tokens: int) -> list[str]:
        now = time.perf_counter()
        then, step, tokens_then = self._since
        self._since = (now, state.global_step, tokens)
        steps = state.global_step - step
        if steps <= 0:
            return []
        left = (state.max_steps - state.global_step) * (now - then) / steps
        speed = [f"{(tokens - tokens_then) / (now - then):,.0f} tokens/s"] if tokens_then >= 0 else []
        return [*speed, f"{int(left) // 60}:{int(left) % 60:02d} left"]


def _is_shown(key: str) -> bool:
    """The loss, and its terms per domain."""
    term, _, domain = key.removeprefix("eval_").partition("/")
    return key in ("loss", "eval_loss") or (bool(domain) and term in _SHOWN)
