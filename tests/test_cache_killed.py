"""A writer that is killed at any moment, and two ranks that write together: the cache ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daekit.teachers import CachedTeacher
from tests.helpers.cache_cases import bytes_of
from tests.helpers.cache_run import ROWS
from tests.helpers.cache_world import build_world, recipe_text
from tests.helpers.ddp_run import ENVIRONMENT, LAUNCHER, ROOT

pytestmark = pytest.mark.slow
RUN = ["-m", "tests.helpers.cache_run"]


def run(*arguments: str, launcher: list[str] | None = None) -> str:
    command = [*(launcher or [sys.executable]), *RUN, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("straight") / "cache"
    run(str(directory))
    return directory


def kill_after(directory: Path, delay: float) -> int:
    """Start a writer, kill it ``delay`` seconds after it began; rows that it had begun to compute, 0 if it was done before."""
    command = [sys.executable, *RUN, str(directory), "slow"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout is not None
        while child.stdout.readline() not in ("begins\n", ""):
            pass
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        return computed(child.stdout.read())


def computed(output: str) -> int:
    return sum(int(line.split()[1]) for line in output.splitlines() if line.startswith("computes"))


@pytest.mark.timeout(900)
def test_killed_at_twenty_moments_it_is_the_same_to_the_byte_and_computes_no_row_twice_but_the_shard_in_hand(
    straight: Path, tmp_path: Path
) -> None:
    rng = random.Random(12)
    largest = max(shard.rows for shard in CachedTeacher(straight).store.shards)
    directory, begun, kills = tmp_path / "cache", 0, 0
    for _ in range(20):
        begun += kill_after(directory, rng.uniform(0.0, 0.25))
        kills += 1
        if (directory / "manifest.json").exists():
            assert bytes_of(directory) == bytes_of(straight)
            directory = tmp_path / f"cache{kills}"
            assert begun <= ROWS + kills * largest
            begun = 0
    begun += computed(run(str(directory)))
    assert begun <= ROWS + kills * largest
    assert bytes_of(directory) == bytes_of(straight)


def test_two_ranks_write_the_same_bytes_and_share_the_work(straight: Path, tmp_path: Path) -> None:
    output = run(str(tmp_path / "cache"), launcher=LAUNCHER)
    assert computed(output) == ROWS and output.count("whole") == 2
    assert bytes_of(tmp_path / "cache") == bytes_of(straight)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_train_a_recipe_from_caches_as_from_live_teachers(engine: str, tmp_path: Path) -> None:
    """The ranks write their parts of each cache before the stage, and read the same one."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    build_world(tmp_path)
    config = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml"), "--num_processes", "2"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    launch = [*(LAUNCHER if engine == "ddp" else accelerate), "-m", "daekit", "train"]
    for name, live in (("live", True), ("cached", False)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe_text(tmp_path, tmp_path / name, live=live))
        done = subprocess.run([*launch, str(path)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("kd", "dae"):
        files = [tmp_path / name / "stages" / stage / "model" / "model.safetensors" for name in ("live", "cached")]
        live_weights, cached_weights = map(load_file, files)
        assert live_weights.keys() == cached_weights.keys()
        for key, weights in live_weights.items():
            if engine == "ddp":
                assert weights.equal(cached_weights[key])
            torch.testing.assert_close(cached_weights[key], weights, rtol=0, atol=1e-6)
