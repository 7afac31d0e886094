"""The checkpoint that a training keeps: the one that has gained most among those that have forgotten little enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daekit.errors import UserError, listed
from daekit.recipe.objective import Selection

METRIC = "selection"  # of the evaluations of a training; the highest is best
_OVER = 1e6  # nats; below the score of any checkpoint that keeps to the limits


def score(selection: Selection, means: Mapping[str, float], divergence: str) -> float:
    """The score of an evaluation, higher is better: -CE on the gain's domain, or less than any such where a limit is broken.

    Args:
        selection: What to select by.
        means: Metric (``ce/shop``, ``kl/general``) -> mean, in nats per token.
        divergence: The metric that forgetting is measured by (``kl``).

    Raises:
        UserError: a metric that the evaluation does not have.
    """
    wanted = {f"ce/{selection.gain}": 0.0} | limits(selection, divergence)
    if missing := [name for name in wanted if name not in means]:
        raise UserError(
            f"select: the validation rows give no {listed(missing)} (there are: {listed(sorted(means))}); name others"
        )
    excess = sum(max(0.0, means[name] - limit) for name, limit in limits(selection, divergence).items())
    return -means[f"ce/{selection.gain}"] if excess == 0 else -_OVER - excess


def limits(selection: Selection, divergence: str) -> dict[str, float]:
    """Metric -> the most that it may be, in nats per token."""
    return {name if "/" in name else f"{divergence}/{name}": limit for name, limit in selection.forgetting.items()}


class Select(TrainerCallback):
    """Ends a training whose best evaluation lies ``patience`` evaluations back, and says at its end what was kept."""

    def __init__(self, selection: Selection, divergence: str) -> None:
        self.selection, self.divergence = selection, divergence

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count from the log, which a checkpoint holds: a resumed run ends where the straight one does."""
        scores = self._scores(state)
        if self.selection.patience is not None and scores:
            control.should_training_stop |= len(scores) - 1 - _best(scores) >= self.selection.patience

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The figures of the checkpoint that was kept."""
        if not state.is_world_process_zero or not (scores := self._scores(state)):
            return
        entry = scores[_best(scores)]
        names = {f"ce/{self.selection.gain}": None} | limits(self.selection, self.divergence)
        figures = [
            f"{name} {entry[f'eval_{name}']:.4g}{'' if limit is None else f' (at most {limit:g})'}"
            for name, limit in names.items()
        ]
        over = entry[f"eval_{METRIC}"] <= -_OVER
        what = "no checkpoint kept to the limits; the one that exceeds them least is" if over else "kept is"
        print(f"    selected: {what} that of step {entry['step']}: {', '.join(figures)}", flush=True)

    @staticmethod
    def _scores(state: TrainerState) -> list[dict[str, Any]]:
        return [entry for entry in state.log_history if f"eval_{METRIC}" in entry]


def _best(scores: list[dict[str, Any]]) -> int:
    """The first of the highest, which is the one that the Trainer keeps."""
    return max(range(len(scores)), key=lambda index: (scores[index][f"eval_{METRIC}"], -index))
