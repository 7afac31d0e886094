"""The examples run as they stand, and with models and rows from disk."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.trainer_world import in_float64  # noqa: F401  (imported for its garbage collector setting)

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, list[float]]:
    """What an example prints at its end: KL before and after, by domain."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    found = re.findall(r"^(\w+).* nats per token: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out, flags=re.MULTILINE)
    return {domain: [float(before), float(after)] for domain, before, after in found}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    for name, model in (("student", tiny.model(seed=1)), ("teacher", tiny.model("mixtral", seed=2))):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.rows(40).to_json(tmp_path / "rows.jsonl")
    return tmp_path


def test_kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("kd.py", "--output_dir", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    before, after = result["KL"]
    assert after < 0.7 * before
    assert (tmp_path / "model.safetensors").is_file()


def test_dae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("dae.py", "--output_dir", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert result["shop"][1] < 0.7 * result["shop"][0]
    assert result["general"][0] == 0.0
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["kd.py", "dae.py"])
def test_with_models_and_rows_from_disk(
    name: str, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["--teacher", f"{disk}/teacher"] if name == "kd.py" else ["--expert", f"shop={disk}/teacher"]
    options = ["--student", f"{disk}/student", *teacher, "--data", f"{disk}/rows.jsonl", "--lora", "--max_steps", "6"]
    result = run(name, *options, "--output_dir", f"{disk}/run", monkeypatch=monkeypatch, capsys=capsys)
    before, after = result["KL" if name == "kd.py" else "shop"]
    assert after < before
    assert (disk / "run" / "adapter_model.safetensors").is_file()
