"""Several machines: real agents of torchrun and accelerate on loopback, one rank each, killed alone or with their rank."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daekit.errors import Stopped, UserError
from daekit.recipe import load_recipe
from daekit.runtime import run as runner
from daekit.runtime.signals import StopRequest
from daekit.trainers import machines
from tests.helpers.processes import forked, start, start_ranks, status_of
from tests.helpers.run_world import assert_same_run, checkpoints, train

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
Popen = subprocess.Popen[bytes]
PATIENCE = 300.0  # seconds: imports take ten of them on an idle machine


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def agents(folder: Path, *script: str, launcher: str = "torchrun", places: tuple[Path, Path] | None = None) -> list[Popen]:
    """Start two agents, each with one rank, that find each other; what they and their ranks say lies in ``folder``."""
    port, started = free_port(), []
    for number in (0, 1):
        if launcher == "torchrun":
            command = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)]
            command += ["--master_addr", "127.0.0.1", "--master_port", port]
        else:
            command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
            command += ["--machine_rank", str(number), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        where = None if places is None else places[number]
        with (folder / f"agent-{number}.txt").open("w") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen([sys.executable, *command, *script], env=ENVIRONMENT, cwd=where, **streams))
    return started


def statuses(processes: list[Popen]) -> list[int]:
    return [each.wait(timeout=PATIENCE) for each in processes]


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def said(folder: Path) -> str:
    return "\n".join((folder / f"agent-{number}.txt").read_text()[-6000:] for number in (0, 1))


def is_gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    status = Path(f"/proc/{process}/stat")
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def recipe(folder: Path) -> str:
    """Write the recipe of ``train`` without running it."""
    assert forked(lambda: train(folder, "stages={}") and 0) == 0
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one machine."""
    folder = tmp_path_factory.mktemp("straight")
    ranks = start_ranks(lambda: train(folder), [folder / "0.txt", folder / "1.txt"])
    assert [status_of(each) for each in ranks] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_train_as_one(launcher: str, tmp_path: Path, straight: Path) -> None:
    assert statuses(agents(tmp_path, "-m", "daekit", "train", recipe(tmp_path), launcher=launcher)) == [0, 0], said(tmp_path)
    assert_same_run(tmp_path, straight)
    assert (tmp_path / "agent-0.txt").read_text().count("[base] complete in") == 1
    assert "[base]" not in (tmp_path / "agent-1.txt").read_text()  # the main process alone speaks


def lingering(folder: Path) -> tuple[list[Popen], list[int]]:
    """Two agents whose ranks are in their fourth step; agents and ranks."""
    script = str(ROOT / "tests" / "helpers" / "machine_run.py")
    started = agents(folder, script, recipe(folder), "4", "3", "stages.base.trainer.save_steps=3")
    reached = [folder / f"reached-{rank}" for rank in (0, 1)]
    wait_for(lambda: all(each.is_file() and each.read_text() for each in reached))
    return started, [int(each.read_text()) for each in reached]


def lose(machine: int, started: list[Popen], ranks: list[int], rank_too: bool) -> float:
    """Kill the agent of a machine, and its rank if asked; the seconds until every process of the run has ended."""
    started[machine].kill()
    if rank_too:
        os.kill(ranks[machine], signal.SIGKILL)
    begun = time.monotonic()
    assert statuses(started)[1 - machine] != 0
    wait_for(lambda: all(map(is_gone, ranks)), 30)
    return time.monotonic() - begun


def goes_on(folder: Path, straight: Path) -> None:
    again = agents(folder, "-m", "daekit", "train", recipe(folder), "stages.base.trainer.save_steps=3")
    assert statuses(again) == [0, 0], said(folder)
    assert "resumed at step" in said(folder)
    assert_same_run(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("agent", [0, 1])
def test_the_ranks_of_a_killed_agent_save_and_end_all(agent: int, tmp_path: Path, straight: Path) -> None:
    """Without its agent a rank would go on, and nobody could end it."""
    started, ranks = lingering(tmp_path)
    print(f"agent {agent} killed: all ended after {lose(agent, started, ranks, rank_too=False):.1f} s")
    assert checkpoints(tmp_path)[-1] == "checkpoint-4"
    assert f"rank {agent}: its launcher was killed" in said(tmp_path)
    goes_on(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_is_lost_ends_the_other(machine: int, tmp_path: Path, straight: Path) -> None:
    started, ranks = lingering(tmp_path)
    print(f"machine {machine} lost: the other ended after {lose(machine, started, ranks, rank_too=True):.1f} s")
    assert checkpoints(tmp_path)[-1] == "checkpoint-3"
    goes_on(tmp_path, straight)


@pytest.mark.slow
def test_an_output_directory_that_the_machines_do_not_share_is_refused(tmp_path: Path) -> None:
    """The second agent works in another directory, where the same relative path names another place."""
    path, places = recipe(tmp_path), (tmp_path / "a", tmp_path / "b")
    for place in places:
        place.mkdir()
    started = agents(tmp_path, "-m", "daekit", "train", path, "output_dir=run", places=places)
    assert 0 not in statuses(started)
    error = rf"output_dir=run: rank 1 on {socket.gethostname()} ({places[1]}/run) does not see what rank 0"
    assert error in said(tmp_path), said(tmp_path)
    assert not list(tmp_path.glob("?/run/stages/*"))


# ---- without agents -----------------------------------------------------------------------------------------------------


def on_two(action: Callable[[], int | None], folder: Path, **environment: str) -> list[int]:
    return [status_of(each) for each in start_ranks(action, [folder / "0.txt", folder / "1.txt"], **environment)]


def test_what_the_main_process_decides_and_what_it_has_against_it(tmp_path: Path) -> None:
    def action() -> None:
        state = machines.connected()
        assert machines.by_main(lambda: Path(f"of-{state.process_index}")) == Path("of-0")

        def refuse() -> None:
            raise UserError(f"said by {state.process_index}")

        with pytest.raises(UserError, match="said by 0"):
            machines.by_main(refuse)

    assert on_two(action, tmp_path) == [0, 0], (tmp_path / "1.txt").read_text()


def test_an_output_directory_is_seen_by_all_or_refused_by_all(tmp_path: Path) -> None:
    def action() -> None:
        state = machines.connected()
        machines.require_shared(tmp_path / "shared")
        with pytest.raises(UserError, match=r"output_dir=.*: rank 1 on .* does not see what rank 0 .* one on a shared"):
            machines.require_shared(tmp_path / f"own-{state.process_index}")

    assert on_two(action, tmp_path) == [0, 0], (tmp_path / "1.txt").read_text()
    assert list((tmp_path / "shared").iterdir()) == []


def test_rows_and_models_are_compared_between_machines_and_not_within_one(tmp_path: Path) -> None:
    def action() -> None:
        state = machines.connected()
        facts = {"data": state.process_index, "seed": 1}
        machines.require_same(lambda: {"seed": 1})
        if os.environ["LOCAL_WORLD_SIZE"] == "2":
            machines.require_same(lambda: facts)
            state.wait_for_everyone()  # a rank that ends while the other connects would be missed
            return
        with pytest.raises(UserError, match=r"rank 1 on .* has read another data than rank 0"):
            machines.require_same(lambda: facts)

    assert on_two(action, tmp_path) == [0, 0], (tmp_path / "1.txt").read_text()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert on_two(action, tmp_path, LOCAL_WORLD_SIZE="1") == [0, 0], (tmp_path / "1.txt").read_text()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_rank_whose_launcher_is_gone_stops_and_a_process_of_its_own_goes_on(ranks: str, tmp_path: Path) -> None:
    def rank() -> None:
        try:
            with StopRequest():
                (tmp_path / "begun").touch()
                time.sleep(4)
            (tmp_path / "went on").touch()
        except Stopped as stop:
            (tmp_path / f"stopped by {stop.status - 128}").touch()

    def launcher() -> None:
        start(rank, tmp_path / "said.txt", WORLD_SIZE=ranks)
        wait_for((tmp_path / "begun").exists)

    assert forked(launcher) == 0
    ends = {"1": "went on", "2": f"stopped by {signal.SIGTERM}"}
    wait_for((tmp_path / ends[ranks]).exists, 20)
    assert len(list(tmp_path.iterdir())) == 3


def test_ranks_wait_as_long_as_the_most_patient_stage_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(runner, "connected", told.append)
    for overrides in ([], ["stages.base.trainer.ddp_timeout=77"]):
        runner.processes_of(load_recipe(Path(recipe(tmp_path)), overrides))
    assert told == [None, 77]
