"""Ranks that are killed, alone or all at once, end the others, and the run goes on to the same weights, to the bit.

Real SIGKILLs of real ranks over gloo, under the engines that ship. The ranks have no launcher, which would end the others.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from daekit.trainers.resume import Checkpoints
from tests.helpers.processes import engine_environment, start_ranks, status_of
from tests.helpers.ranks_world import KillAtStep, on_ranks, results, said, train

LOST_WITHIN = 30.0  # seconds after which no rank may be left; measured: below 2 on an idle machine
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
MOMENTS = ["rank 0 at step 3", "rank 1 at step 5", "rank 1 in a save", "all at step 3", "all in a save"]


def killed(moment: str) -> list[int]:
    """The ranks that are killed."""
    return [0, 1] if moment.startswith("all") else [int(moment.split()[1])]


def dying(moment: str, folder: Path) -> Callable[[], None]:
    """What a rank does that may be killed."""

    def action() -> None:
        mine = int(os.environ["RANK"]) in killed(moment)
        if mine and moment.endswith("save"):
            original = Checkpoints.facts

            def facts(self: Checkpoints) -> object:  # of checkpoint-4: all its files are written, its manifest is not
                if (folder / "checkpoint-4").is_dir():
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self)

            Checkpoints.facts = facts  # type: ignore[method-assign, assignment]
        step = int(moment[-1]) if moment[-1].isdigit() and mine else 0
        train("dense", folder, KillAtStep(step))

    return action


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_ranks_end_the_others_and_the_run_goes_on(engine: str, tmp_path: Path) -> None:
    assert on_ranks(2, lambda: train("dense", tmp_path / "straight"), tmp_path / "straight", engine) == [0, 0]
    (expected, _) = results(tmp_path / "straight", 2)
    for moment in MOMENTS:
        folder = tmp_path / moment.replace(" ", "-")
        folder.mkdir()
        outputs = [folder / f"said-{rank}.txt" for rank in (0, 1)]
        processes = start_ranks(dying(moment, folder), outputs, **engine_environment(engine))
        first = killed(moment)[0]
        statuses = {first: status_of(processes[first])}
        begun = time.monotonic()
        statuses[1 - first] = status_of(processes[1 - first])
        waited = time.monotonic() - begun
        print(f"{engine}, {moment}: the other rank ended after {waited:.1f} s")
        assert waited < LOST_WITHIN
        assert all((statuses[rank] == -signal.SIGKILL) == (rank in killed(moment)) for rank in (0, 1)), said(folder)
        assert all(statuses.values()), moment
        assert on_ranks(2, lambda folder=folder: train("dense", folder), folder, engine) == [0, 0], said(folder)
        for found in results(folder, 2):
            assert torch.equal(found["weights"], expected["weights"]), moment
            assert found["history"] == expected["history"] != [], moment


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_waited_for_as_long_as_was_said(tmp_path: Path) -> None:
    """As after a machine has lost its network: no connection is closed."""

    def action() -> None:
        callback = KillAtStep(3)
        if os.environ["RANK"] == "1":
            callback.signal = signal.SIGSTOP
        train("dense", tmp_path, callback if os.environ["RANK"] == "1" else None, ddp_timeout=8)

    processes = start_ranks(action, [tmp_path / "said-0.txt", tmp_path / "said-1.txt"], **engine_environment("ddp"))
    begun = time.monotonic()
    try:
        assert status_of(processes[0]) == 1
        assert 8 <= time.monotonic() - begun < 8 + LOST_WITHIN
        assert "imed out" in said(tmp_path)
    finally:
        os.kill(processes[1], signal.SIGKILL)
        status_of(processes[1])
