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


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``run(*options)`` of a benchmark of three cases -> (status, the cases that were measured); no process is started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    measured: list[str] = []
    says: dict[str, dict[str, Any]] = {}

    def child(case: Any, name: str) -> dict[str, Any]:
        measured.append(case.name)
        return {"seconds": 1.0, "held_mb": 1.0, "peak_mb": 1.0, "check": [2.0]} | says.get(f"{case.name} {name}", {})

    monkeypatch.setattr(harness, "_run_child", child)
    monkeypatch.setattr(harness, "calibration", lambda _: "")
    cases = [harness.Case(name, dict.fromkeys(["ours", "plain"]), 1e-3) for name in ("a", "b", "c")]

    def run(*options: str) -> tuple[int, list[str]]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "rows.json"), *options])
        with pytest.raises(SystemExit) as end:
            harness.main("", lambda _: cases, lambda parser: parser.add_argument("--weight", type=float))
        return int(end.value.code or 0), measured[::2]

    run.says, run.file = says, tmp_path / "rows.json"  # type: ignore[attr-defined]
    return run


def test_what_a_time_limit_cuts_off_is_gone_on_with(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    past = "--until", "0"
    assert ran("--resume", *past) == (3, []) and "left, for the time is over: a, b, c" in capsys.readouterr().out
    assert ran("--resume", "--first", "1") == (0, ["a"])
    assert ran("--resume", *past) == (3, []) and "over: b, c" in capsys.readouterr().out
    assert ran("--resume") == (0, ["b", "c"])
    assert [row["case"] for row in json.loads(ran.file.read_text())] == ["a", "a", "b", "b", "c", "c"]
    assert ran("--resume", *past) == (0, []), "nothing is left"
    assert ran("--resume", "--only", "b") == (0, []) and len(json.loads(ran.file.read_text())) == 6
    assert ran() == (0, ["a", "b", "c"]), "without --resume all is measured"


def test_rows_of_another_machine_or_that_are_not_sound_are_measured_again(ran: Any) -> None:
    ran.says["b plain"] = {"seconds": None, "note": "failed with status 1", "failed": True, "check": []}
    ran.says["c plain"] = {"check": [3.0]}
    assert ran("--resume") == (1, ["a", "b", "c"])
    ran.says.clear()
    assert ran("--resume") == (0, ["b", "c"])
    ran.says["a ours"] = {"seconds": None, "peak_mb": None, "note": "out of memory", "check": []}
    for options in (["--weight", "1"], ["--repeats", "3"], ["--dtype", "bfloat16"], ["--small"]):
        assert ran("--resume", *options) == (0, ["a", "b", "c"]), options
        assert ran("--resume", *options) == (0, []), "running out of memory is a result"
    rows = json.loads(ran.file.read_text())
    ran.file.write_text(json.dumps([row | {"versions": {}} for row in rows]))
    assert ran("--resume", "--small") == (0, ["a", "b", "c"])


@pytest.mark.slow
def test_gpu_sh_goes_on_where_its_time_was_over(tmp_path: Path) -> None:
    """The script itself, on a CPU."""

    def run_script(**changes: str) -> subprocess.CompletedProcess[str]:
        settings = dict(OUT=str(tmp_path), DEVICE="cpu", SMALL="1", ONLY="prediction attention", PYTHON=sys.executable)
        command = [str(BENCHMARKS / "gpu.sh")]
        return subprocess.run(command, env=os.environ | settings | changes, capture_output=True, text=True, check=False)

    nothing = run_script(BUDGET="0")
    assert nothing.returncode == 3 and "LEFT for the next call: prediction" in nothing.stdout, nothing.stdout
    assert not list(tmp_path.glob("*.json"))
    assert run_script().returncode == 0
    written = {path: path.read_text() for path in tmp_path.glob("*.json")}
    again = run_script(BUDGET="0")
    assert again.returncode == 0 and "4 of 4 cases are in" in again.stdout
    assert len(written) == 2 and all(path.read_text() == text for path, text in written.items())


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
