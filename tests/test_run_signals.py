"""A run that gets a signal saves a checkpoint at the next step boundary and exits with the signal's status; real processes.

The same command then ends at the same weights and the same log as the run that got none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daekit.errors import Stopped
from daekit.runtime import run as runner
from daekit.runtime.signals import SIGNALS, SaveOnSignal, StopRequest
from tests.helpers.processes import forked, start_ranks, status_of
from tests.helpers.run_world import assert_same_run, checkpoints, during_step, stage_of, train

EPOCHS = ["stages.base.trainer.eval_strategy=epoch", "stages.base.trainer.logging_strategy=epoch"]
EVALUATED = ["stages.base.trainer.eval_strategy=steps", "stages.base.trainer.eval_steps=2"]


def send(*signals: int, pause: float = 0.0) -> None:
    """Send signals to this process."""
    for index, number in enumerate(signals):
        time.sleep(pause if index else 0)
        os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert forked(lambda: train(folder)) == 0
    return folder


def test_a_run_outlives_whoever_reads_what_it_prints(tmp_path: Path, straight: Path) -> None:
    """``daekit train ... | head``, or a ``tee`` that is killed."""
    recipe = (straight / "recipe.yaml").read_text().replace(str(straight), str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = [sys.executable, "-m", "daekit", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert_same_run(tmp_path, straight)


def run_with_signal(folder: Path, step: int, *signals: int, arguments: list[str] | None = None) -> int:
    """Train with signals to its own process during a step; the exit status."""

    def action() -> int:
        during_step(step, lambda: send(*signals))
        return train(folder, *(arguments or []))

    folder.mkdir(exist_ok=True)
    return forked(action, folder / "output.txt")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_to_the_bit(number: int, tmp_path: Path, straight: Path) -> None:
    assert run_with_signal(tmp_path, 4, number) == 128 + number
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert not (stage_of(tmp_path) / "stage.json").exists() and not (tmp_path / "run" / "run.lock").exists()
    said = (tmp_path / "output.txt").read_text()
    assert f"stopped by {signal.Signals(number).name}; checkpoint-4 is saved" in said and "Traceback" not in said
    assert forked(lambda: train(tmp_path)) == 0
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize(("step", "arguments"), [(5, EPOCHS), (4, EVALUATED), (7, []), (3, ["--grace", "20"])])
def test_what_belongs_to_the_step_is_done_before_the_save(step: int, arguments: list[str], tmp_path: Path) -> None:
    """The last step of an epoch, one that is evaluated, and the last of all."""
    assert forked(lambda: train(tmp_path / "straight", *arguments)) == 0
    assert run_with_signal(tmp_path / "stopped", step, signal.SIGTERM, arguments=arguments) == 143
    assert checkpoints(tmp_path / "stopped") == [f"checkpoint-{step}"]
    assert forked(lambda: train(tmp_path / "stopped", *arguments)) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_a_signal_during_an_evaluation_saves_after_it(tmp_path: Path) -> None:
    assert forked(lambda: train(tmp_path / "straight", *EVALUATED)) == 0

    def action() -> int:
        SaveOnSignal.on_prediction_step = lambda self, args, state, control, **_: (  # type: ignore[method-assign]
            send(signal.SIGTERM) if state.global_step == 4 else None
        )
        return train(tmp_path / "stopped", *EVALUATED)

    assert forked(action) == 143
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-4"]
    assert forked(lambda: train(tmp_path / "stopped", *EVALUATED)) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_what_a_launcher_passes_on_at_once_is_one_request(tmp_path: Path) -> None:
    assert run_with_signal(tmp_path, 4, signal.SIGTERM, signal.SIGTERM, signal.SIGINT) == 143
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """In the middle of a step; the end of the grace time would give the status of the first."""

    def action() -> int:
        during_step(4, lambda: (send(signal.SIGTERM, signal.SIGINT, pause=1.2), time.sleep(60)))
        return train(tmp_path)

    assert forked(action, tmp_path / "output.txt") == 128 + signal.SIGINT
    assert checkpoints(tmp_path) == []
    assert not (tmp_path / "run" / "run.lock").exists()
    assert "second signal" in (tmp_path / "output.txt").read_text()


def test_a_step_longer_than_the_grace_time_is_not_waited_for(tmp_path: Path) -> None:
    def action() -> int:
        during_step(4, lambda: (send(signal.SIGTERM), time.sleep(60)))
        return train(tmp_path, "--grace", "0.5")

    begun = time.monotonic()
    assert forked(action, tmp_path / "output.txt") == 143
    assert time.monotonic() - begun < 30 and checkpoints(tmp_path) == []
    assert "within 0.5 s" in (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize("place", ["build_report", "prepare"])
def test_where_there_is_nothing_to_save_it_ends_at_once(place: str, tmp_path: Path) -> None:
    """While everything is opened, and while the report is made."""

    def wait(*_: object, **__: object) -> None:
        send(signal.SIGTERM)
        time.sleep(60)

    def action() -> int:
        setattr(runner, place, wait)
        return train(tmp_path, "evaluation.max_new_tokens=2")

    begun = time.monotonic()
    assert forked(action, tmp_path / "output.txt") == 143
    assert time.monotonic() - begun < 50
    said = (tmp_path / "output.txt").read_text()
    assert "nothing was to be saved; the same command goes on" in said and "Traceback" not in said


def test_a_signal_that_was_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert before == [signal.getsignal(number) for number in SIGNALS]


def test_a_worker_process_leaves_the_signal_to_its_parent() -> None:
    def worker(number: int) -> int:
        send(number)
        time.sleep(0.1)
        return 7

    with StopRequest() as stop:
        assert forked(lambda: worker(signal.SIGINT)) == 7
        assert forked(lambda: worker(signal.SIGTERM)) == -signal.SIGTERM
        assert stop.signum == 0


def test_two_ranks_stop_at_one_step(tmp_path: Path) -> None:
    """The signal reaches the second rank alone."""

    def ranks(folder: Path, signalled: bool) -> list[int]:
        def action() -> int:
            if signalled and os.environ["RANK"] == "1":
                during_step(4, lambda: send(signal.SIGTERM))
            return train(folder)

        folder.mkdir(exist_ok=True)  # for the outputs
        return [status_of(each) for each in start_ranks(action, [folder / "0.txt", folder / "1.txt"])]

    assert ranks(tmp_path / "straight", False) == [0, 0]
    assert ranks(tmp_path / "stopped", True) == [143, 143]
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-4"]
    assert "another rank" in (tmp_path / "stopped" / "0.txt").read_text()
    assert ranks(tmp_path / "stopped", False) == [0, 0]
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(tmp_path: Path) -> None:
    """SIGTERM to the launcher, as Slurm or a spot machine sends it."""
    assert train_options(tmp_path) == 0  # writes the recipe
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "daekit", "train"]
    command += [str(tmp_path / "recipe.yaml"), "stages.base.trainer.max_steps=100000", "stages.base.trainer.logging_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if "step 3/" in line:
                launcher.send_signal(signal.SIGTERM)
    (name,) = checkpoints(tmp_path)
    step = int(name.removeprefix("checkpoint-"))
    assert step >= 3
    longer = [f"stages.base.trainer.max_steps={step + 3}", "stages.base.trainer.logging_steps=1"]
    resumed = subprocess.run([*command[:-2], *longer], env=environment, check=True, capture_output=True, text=True)
    assert f"resumed at step {step}/{step + 3}" in resumed.stdout


def train_options(folder: Path) -> int:
    """Write the recipe of ``train`` without running it."""
    return forked(lambda: train(folder, "stages={}") and 0)
