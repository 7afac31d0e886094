"""A run goes on with another number of ranks, and ends where it would have ended: real ranks over gloo, killed by SIGKILL."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_world
from tests.helpers.processes import forked
from tests.helpers.ranks_world import KillAtStep, on_ranks, results, said, train
from tests.helpers.run_world import during_step
from tests.helpers.trainer_world import relative

SAME = 1e-5  # what rounding may do
KILLED = -signal.SIGKILL


def straight(student: str, folder: Path, engine: str = "ddp", **changes: Any) -> dict[str, Any]:
    """The run on two ranks that nobody disturbs."""
    assert on_ranks(2, lambda: train(student, folder, **changes), folder, engine) == [0, 0], said(folder)
    first, second = results(folder, 2)
    assert torch.equal(first["weights"], second["weights"])
    return first


def leg(count: int, student: str, folder: Path, kill: int | None = None, engine: str = "ddp", **changes: Any) -> None:
    """So many ranks go on with the run, to its end or to where they are killed."""
    callback = None if kill is None else KillAtStep(kill)
    done = on_ranks(count, lambda: train(student, folder, callback, **changes), folder, engine)
    assert done == [0 if kill is None else KILLED] * count, said(folder)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert relative(found["weights"], expected["weights"]) < SAME
    assert len(found["history"]) == len(expected["history"]) > 1
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("student", ["dense", pytest.param("on-policy", marks=pytest.mark.slow)])
def test_two_ranks_then_one_then_two(student: str, tmp_path: Path) -> None:
    expected = straight(student, tmp_path / "straight")
    run = tmp_path / "run"
    leg(2, student, run, kill=3)
    leg(1, student, run, kill=5)
    assert "per_device_train_batch_size=2, gradient_accumulation_steps=4" in said(run)
    leg(2, student, run)
    assert_same(results(run, 2)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["lora", "mixtral"])
def test_one_rank_then_two_then_one(student: str, tmp_path: Path) -> None:
    expected = straight(student, tmp_path / "straight")
    run, wide = tmp_path / "run", {"gradient_accumulation_steps": 4}
    leg(1, student, run, kill=3, **wide)
    leg(2, student, run, kill=5, **wide)
    leg(1, student, run, **wide)
    assert_same(results(run, 1)[0], expected)


@pytest.mark.parametrize("count", [4, 8])
def test_two_ranks_then_more(count: int, tmp_path: Path) -> None:
    """On eight each takes one row a step."""
    expected = straight("dense", tmp_path / "straight")
    leg(2, "dense", tmp_path / "run", kill=4)
    leg(count, "dense", tmp_path / "run")
    assert_same(results(tmp_path / "run", count)[0], expected)
    assert f"per_device_train_batch_size={8 // count if count > 4 else 2}, gradient_accumulation_steps=1" in said(
        tmp_path / "run"
    )


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("student", ["dense", "lora"])
def test_fsdp2_then_one_process_then_fsdp2(student: str, optim: str, tmp_path: Path) -> None:
    """One process takes over what was split, and the other way round."""
    expected = straight(student, tmp_path / "straight", "fsdp2", optim=optim)
    assert expected["kind"] == "FSDP"
    run = tmp_path / "run"
    leg(2, student, run, kill=3, engine="fsdp2", optim=optim)
    leg(1, student, run, kill=5, optim=optim)
    leg(2, student, run, engine="fsdp2", optim=optim)
    assert_same(results(run, 2)[0], expected)


@pytest.mark.slow
def test_fsdp2_on_four_ranks(tmp_path: Path) -> None:
    expected = straight("dense", tmp_path / "straight", "fsdp2")
    leg(2, "dense", tmp_path / "run", kill=4, engine="fsdp2")
    leg(4, "dense", tmp_path / "run", engine="fsdp2")
    assert_same(results(tmp_path / "run", 4)[0], expected)


def test_a_recipe_goes_on_on_one_process_and_says_how(tmp_path: Path) -> None:
    options = [f"stages.base.trainer.{each}" for each in ("save_steps=2", "optim=sgd", "learning_rate=0.5")]

    def train_until_step_4() -> int:
        during_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return run_world.train(tmp_path / "run", *options)

    expected, run = tmp_path / "straight", tmp_path / "run"
    assert on_ranks(2, lambda: run_world.train(expected, *options), expected) == [0, 0], said(expected)
    assert on_ranks(2, train_until_step_4, run) == [KILLED, KILLED], said(run)

    def train_alone() -> int:
        logging.basicConfig(force=True)  # as where pytest does not catch what is logged
        return run_world.train(run, *options)

    assert forked(train_alone, run / "said-1.txt") == 0, said(run)
    assert "on 1 a step trains on the same 8 rows with per_device_train_batch_size=4" in said(run)
    ours, theirs = run_world.weights(run), run_world.weights(expected)
    assert all(relative(ours[name], tensor) < SAME for name, tensor in theirs.items())
