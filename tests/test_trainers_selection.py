"""Of a training's checkpoints the one is kept that gained most among those that forgot little enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from daekit.errors import UserError
from daekit.recipe.objective import Selection
from daekit.trainers import DAETrainer
from daekit.trainers.selection import score
from tests.helpers import tiny
from tests.helpers.trainer_world import dae

STEPS = 8


class StopAt(TrainerCallback):
    """Ends a training after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def trained(folder: Path, resume: bool = False, stop: int = STEPS, **select: Any) -> DAETrainer:
    """A run that evaluates and saves at every step; it moves away from the reference on rows of the shop."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}
    selection = {"gain": "shop", "forgetting": {"general": 1e9}} | select
    rows, held_out = tiny.rows(64, domains=("shop", "shop", "shop", "general")), tiny.rows(16, seed=1)
    given: dict[str, Any] = every | {"eval_dataset": held_out, "reference": None, "max_steps": STEPS, "select": selection}
    trainer = dae(folder, rows, tiny.model(seed=1), **given)
    trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def evaluations(trainer: DAETrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def kept_step(trainer: DAETrainer, folder: Path) -> int:
    """The step whose checkpoint has the weights that the trainer ends with."""
    ends = trainer.model.state_dict()
    for step in range(1, STEPS + 1):
        file = folder / f"checkpoint-{step}" / "model.safetensors"
        if file.is_file() and all(torch.equal(value, ends[name]) for name, value in load_file(file).items()):
            return step
    raise AssertionError("no checkpoint has the weights that were kept")


def test_the_highest_gain_within_the_limit_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = evaluations(trained(tmp_path / "free"))
    best = min(free, key=lambda entry: entry["eval_ce/shop"])
    limit = 0.999 * best["eval_kl/general"]
    allowed = [entry for entry in free if entry["eval_kl/general"] <= limit]
    wanted = min(allowed, key=lambda entry: entry["eval_ce/shop"])["step"]
    assert 1 < len(allowed) < STEPS and wanted != best["step"], "the limit must decide something"
    capsys.readouterr()
    trainer = trained(tmp_path / "run", forgetting={"general": limit})
    assert kept_step(trainer, tmp_path / "run") == wanted
    assert f"kept is that of step {wanted}: ce/shop" in capsys.readouterr().out


def test_without_any_within_the_limit_the_least_forgetting_is_kept_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(tmp_path, forgetting={"kl/general": 0.0})
    least = min(evaluations(trainer), key=lambda entry: entry["eval_kl/general"])["step"]
    assert kept_step(trainer, tmp_path) == least and "no checkpoint kept to the limits" in capsys.readouterr().out


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(tmp_path: Path) -> None:
    few = {"forgetting": {"general": 0.0}, "patience": 2}  # the first evaluation has drifted least: it stays the best
    straight = trained(tmp_path / "straight", **few)
    best = evaluations(straight)[0]["step"]
    assert straight.state.global_step == best + 2 < STEPS
    trained(tmp_path / "resumed", stop=2, **few)
    resumed = trained(tmp_path / "resumed", resume=True, **few)
    assert resumed.state.global_step == straight.state.global_step
    assert kept_step(resumed, tmp_path / "resumed") == kept_step(straight, tmp_path / "straight") == best


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain": "shp"}, "did you mean 'shop'"),
        ({"forgetting": {"genral": 0.1}}, "did you mean 'general'"),
        ({"forgetting": {}}, "forgetting"),
        ({"forgetting": {"general": -0.1}}, "greater than or equal to 0"),
        ({"patience": 0}, "patience"),
        ({"gian": "shop"}, "gian"),
    ],
)
def test_what_cannot_be_selected_by_is_refused_before_the_first_step(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        trained(tmp_path, **changes)


def test_an_evaluation_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eval_strategy"):
        dae(tmp_path, tiny.rows(8), select={"gain": "shop", "forgetting": {"general": 1.0}})


def test_scores_rank_the_allowed_by_gain_and_the_others_below_by_excess() -> None:
    selection = Selection(gain="shop", forgetting={"general": 0.1, "ce/general": 3.0})
    means = {"ce/shop": 2.0, "kl/general": 0.1, "ce/general": 3.0}
    assert score(selection, means, "kl") == -2.0
    worse, worst = (score(selection, means | {"kl/general": value, "ce/shop": 0.0}, "kl") for value in (0.2, 0.3))
    assert -2.0 > worse > worst
