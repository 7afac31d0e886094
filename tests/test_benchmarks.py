"""The benchmarks run, write the form that is promised, and their contestants agree. Speed is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
YARDSTICKS = {"floor", "off-policy", "sdpa", "sft", "sft-daekit", "three-models-16bit", "top_k"}  # other work


def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["prediction.py", "attention.py", "step.py", "on_policy.py", "adapters.py", "cache.py"])
def test_contestants_agree(script: str, tmp_path: Path) -> None:
    done = run(BENCHMARKS / script, "--small", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"] for row in rows} > {"ours"}
    for row in rows:
        assert {"case", "name", "seconds", "peak_mb", "ratio_time", "ratio_memory", "machine", "date", "versions"} <= row.keys()
        assert f"{row['case']:<44} {row['name']:<22}" in done.stdout
        assert row["seconds"] > 0 and row["peak_mb"] >= 0, row["note"]
        assert row["agrees"] is (None if row["name"] in YARDSTICKS else True)
        ours = next(other for other in rows if (other["case"], other["name"]) == (row["case"], "ours"))
        assert row["ratio_time"] == pytest.approx(row["seconds"] / ours["seconds"])


@pytest.mark.slow
def test_loading_keeps_to_its_memory(tmp_path: Path) -> None:
    """The peak of resident memory: what is quantised, one and a half shards and 0.1 GiB; reading by mapping takes more."""
    done = run(BENCHMARKS / "loading.py", "--small", "--names", "ours", "mapped", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {(row["name"], row["case"]) for row in rows} == {(n, c) for n in ("ours", "mapped") for c in ("4bit", "8bit")}
    for row in rows:
        assert row["shards"] == 13 and row["checkpoint_gib"] > 10 * row["largest_shard_gib"]
        assert row["expert_bytes"] < (0.60 if row["case"] == "4bit" else 1.1)
        tight = row["model_gib"] + 1.5 * row["largest_shard_gib"] + 0.1
        assert (row["peak_gib"] < tight) == (row["name"] == "ours")


ODD_ONES = """
import torch
from harness import Case, Unavailable, main

def work(factor):
    x = torch.ones(8, requires_grad=True)
    return lambda: ((factor * x).sum().detach(), torch.autograd.grad((factor * x).sum(), [x]))

def missing():
    raise Unavailable("not here")

def broken():
    raise RuntimeError("this one is broken")

makers = dict(ours=lambda: work(1.0), same=lambda: work(1.00001), other=lambda: work(1.1), missing=missing, broken=broken)
main("", lambda options: [Case("all", makers, 1e-3)])
"""


@pytest.mark.slow
def test_what_differs_or_fails_is_marked(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD_ONES)
    done = run(tmp_path / "odd.py", "--json", str(tmp_path / "results.json"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert done.returncode == 1
    assert {name: row["agrees"] for name, row in rows.items()} == dict(
        ours=True, same=True, other=False, missing=None, broken=None
    )
    assert "COMPUTES SOMETHING ELSE" in rows["other"]["note"] and rows["other"]["note"] in done.stdout
    assert rows["missing"]["note"] == "not here" and rows["missing"]["seconds"] is None
    assert "failed" in rows["broken"]["note"] and "this one is broken" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    if sampled:
        monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)
    held = torch.ones(2**23)  # 32 MB that were there before
    with measure.PeakMemory(torch.device("cpu")) as memory:
        for _ in range(2):
            passing = torch.ones(2**24)  # 64 MB, freed before the end
            time.sleep(0.05)
            del passing
    assert memory.megabytes == pytest.approx(64, abs=8)
    assert held.sum() == 2**23
