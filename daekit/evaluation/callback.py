"""The likelihood benchmarks of a suite during a training, which is the same to the bit with and without them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daekit.errors import UserError
from daekit.evaluation.evaluate import ModelEvaluation, exponential
from daekit.evaluation.likelihood import likelihood_benchmark
from daekit.models.backbone import frozen_forward
from daekit.recipe.suite import LIKELIHOOD, SuiteSpec

_NAME = "the model in training"


class EvaluationCallback(TrainerCallback):
    """Measures the model in training and logs the values through the trainer, as ``eval_<metric>/<domain>``.

    ``trainer.add_callback(EvaluationCallback(trainer, load_suite("suite.yaml", need_models=False), steps=500))``. Benchmarks of
    the suite that need a judge are left out. Every rank measures all of it and the main process logs, so no rank waits for
    another. Random states, the mode of every module and the trainer's own running means are as before when a step goes on.

    Args:
        trainer: any transformers or TRL trainer of a causal language model, with its tokenizer as ``processing_class``.
        suite: what to measure; its ``models`` are not used.
        steps: measure every so many optimizer steps; default: whenever the trainer evaluates.

    Raises:
        UserError: the suite has no likelihood benchmark, an input is broken or does not fit the model, or the model is sharded
            (FSDP, ZeRO-3), so that no rank has all of it.
    """

    def __init__(self, trainer: Trainer, suite: SuiteSpec, steps: int | None = None) -> None:
        if steps is not None and steps <= 0:
            raise UserError(f"EvaluationCallback: steps={steps} must be greater than 0")
        if trainer.is_fsdp_enabled or getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
            raise UserError(
                "EvaluationCallback: the model is sharded (FSDP or ZeRO-3); measure its checkpoints with `daekit eval`"
            )
        self.trainer, self.suite, self.steps = trainer, suite, steps
        specs = [(name, spec) for name, spec in suite.benchmarks.items() if isinstance(spec, LIKELIHOOD)]
        if not specs:
            raise UserError(f"EvaluationCallback: the suite {suite.name!r} has no benchmark without a judge")
        self.benchmarks = [likelihood_benchmark(name, spec) for name, spec in specs]
        context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        for benchmark in self.benchmarks:
            benchmark.check(_NAME, trainer.processing_class, context)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every ``steps`` steps."""
        if self.steps is not None and state.global_step % self.steps == 0:
            self._measure()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """With the trainer's own evaluation."""
        if self.steps is None:
            self._measure()

    def _measure(self) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with _random_state_kept(), frozen_forward(model):
            values = self._values(model)
            # logged in eval mode: in training mode the trainer would take the means of its window along, and begin a new one
            wanted = trainer.control.should_log
            trainer.log(values)
            trainer.control.should_log = wanted  # any log clears it, also that of the trainer's own values of this step

    def _values(self, model: Any) -> dict[str, float]:
        logs: dict[str, float] = {}
        for benchmark in self.benchmarks:
            measured = benchmark.measure(model, self.trainer.processing_class, self.suite.batch_size)
            evaluation = ModelEvaluation(_NAME, measured.values)
            for (domain, label, metric), values in evaluation.by_domain().items():
                if label == domain:
                    logs[f"eval_{metric}/{domain}"] = values.mean
                    if metric == "nll":
                        logs[f"eval_perplexity/{domain}"] = exponential(values.mean)
            logs |= {f"eval_{metric}/{domain}": value for domain, metric, value, *_ in measured.rows}
        return logs


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's random states are as before on leaving, on the CPU and every accelerator."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = torch.accelerator.current_accelerator()
    with torch.random.fork_rng(enabled=True, device_type=kind.type if kind else "cpu", devices=None if kind else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
