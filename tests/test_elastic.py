"""A run goes on with another number of ranks, and ends where it would have ended: real ranks over gloo, killed by SIGKILL."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks_world import KillAtStep, on_ranks, results, said, train
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
