"""Two processes under DDP, FSDP2, ZeRO-2 and ZeRO-3 train as one does: real engines over gloo, by the launches that ship."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daekit.models.loading import load_model
from daekit.recipe import load_recipe
from daekit.recipe.schema import ModelSpec
from daekit.runtime.run import run_recipe
from tests.helpers.ddp_run import CASES, ENVIRONMENT, RECIPE, SAME, require_same, train, write_models
from tests.helpers.trainer_world import relative

ROOT = Path(__file__).parents[1]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = [
    "ddp",
    "fsdp2",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]
SHARDED = ENGINES[1:]
READ = ["dae-read", "dae-read-reference", "dae-read-lora-reference", "kd-read-lora", "kd-read-tied-checkpointing"]
READ += ["kd-read-bf16", "dae-read-reference-bf16", "dae-read-lora-reference-bf16"]
READ_RESUMED = ["kd-read-resumed", "dae-read-lora-reference-resumed"]
FOUR_BITS = ["kd-4bit-teacher", "kd-4bit-experts", "kd-whole-teacher"]
RESUMED_IN_FOUR_BITS = "kd-4bit-student-lora-resumed"
RESUMED = ["kd-resumed", "kd-sgd-resumed", "kd-inside-resumed", "dae-reference-resumed", "dae-lora-reference-resumed"]


def launch(engine: str, *command: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with the configuration that ships, on two processes."""
    config = str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = ENVIRONMENT | {"PYTHONPATH": paths}
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=500)
    said = [line for line in done.stderr.splitlines() if "leaked" not in line]  # Triton's bindings, hundreds of lines
    assert done.returncode == 0, "\n".join(said)[-6000:]
    return done


def run(engine: str, cases: list[str], folder: Path) -> None:
    launch(engine, str(ROOT / "tests" / "helpers" / "engine_run.py"), engine, str(folder), json.dumps(cases))


def run_reading(engine: str, cases: list[str], folder: Path) -> None:
    write_models(folder)
    run(engine, cases, folder)


def compare(engine: str, cases: list[str], folder: Path) -> None:
    run(engine, cases, folder)
    for case in cases:
        train(case, folder, 1)
        require_same(case, folder)


def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    write_models(tmp_path)
    compare("fsdp2", ["dae-inside-checkpointing-one-domain-per-rank", "dae-read"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_case_equals_one_process(engine: str, tmp_path: Path) -> None:
    compare(engine, [case for case in CASES + FOUR_BITS if engine != "fsdp2" or "on-policy" not in case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_models_read_in_parts_train_as_whole_ones(engine: str, tmp_path: Path) -> None:
    run_reading(engine, [f"{case}-twice" for case in READ], tmp_path)  # asserts there


@pytest.mark.slow
@needs_deepspeed
def test_zero3_reads_a_teacher_in_its_own_dtype(tmp_path: Path) -> None:
    write_models(tmp_path)
    compare("zero3", ["kd-read-half-teacher"], tmp_path)  # in float32 it would say something else than in one process


@pytest.mark.slow
def test_fsdp2_loads_the_best_student(tmp_path: Path) -> None:
    run("fsdp2", ["kd-best"], tmp_path)  # asserts there


@pytest.mark.slow
def test_fsdp2_refuses_that_the_student_writes(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="under FSDP2: each token that the student writes would gather every layer"):
        run("fsdp2", ["kd-on-policy"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_four_bit_student(engine: str, tmp_path: Path) -> None:
    cases = ["kd-4bit-student-lora", "kd-4bit-student-lora-bf16"]
    run(engine, cases, tmp_path)
    for case, rounding in zip(cases, (1e-5, 5e-3), strict=True):
        train(case, tmp_path, 1)
        one, two = (torch.load(tmp_path / f"{case}-{name}.pt") for name in ("1-0", "2-0"))
        assert relative(two["weights"], one["weights"]) < 0.01  # TRL trains its adapter in bfloat16
        for ours, theirs in zip(two["history"], one["history"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=rounding), case


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_four_bit_student_resumes(engine: str, tmp_path: Path) -> None:
    run(engine, [RESUMED_IN_FOUR_BITS], tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{RESUMED_IN_FOUR_BITS}-resumed-{rank}.pt")
        assert torch.equal(found["straight"], found["resumed"]) and found["straight history"] == found["resumed history"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reference_rounds_as_the_student(engine: str, tmp_path: Path) -> None:
    run(engine, ["dae-reference-rounded", "dae-lora-reference-rounded"], tmp_path)  # asserts there


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_resumed_run_is_the_straight_one(engine: str, tmp_path: Path) -> None:
    run_reading(engine, RESUMED + READ_RESUMED, tmp_path)
    for case in RESUMED + READ_RESUMED:
        first, second = (torch.load(tmp_path / f"{case}-resumed-{rank}.pt") for rank in (0, 1))
        for rank in (first, second):
            assert torch.equal(rank["straight"], rank["resumed"]), case
            assert rank["straight history"] == rank["resumed history"] and rank["straight history"], case
        assert torch.equal(first["straight"], second["straight"]), case
    for name in ("checkpoint-4", "model"):  # whole, in safetensors, and readable by one process
        model = load_model(ModelSpec(path=str(tmp_path / "kd-resumed" / "resumed" / name)))
        saved = torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])
        assert torch.equal(saved, torch.load(tmp_path / "kd-resumed-resumed-0.pt")["resumed"])
        adapter = load_file(tmp_path / "dae-lora-reference-resumed" / "resumed" / name / "adapter_model.safetensors")
        assert all(tensor.numel() for tensor in adapter.values())
        trained = torch.load(tmp_path / "dae-lora-reference-resumed-resumed-0.pt")["resumed"]
        assert sum(tensor.numel() for tensor in adapter.values()) == trained.numel()  # the student's adapter alone


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_recipe_runs_as_on_one_process(engine: str, tmp_path: Path) -> None:
    recipes: dict[int, Path] = {}
    for world in (1, 2):
        text = RECIPE.replace("OUT", str(tmp_path / str(world))).replace("size: 4", f"size: {4 // world}")
        recipes[world] = tmp_path / f"{world}.yaml"
        recipes[world].write_text(text)
    launch(engine, "-m", "daekit", "train", str(recipes[2]))
    run_recipe(load_recipe(recipes[1]))
    one, two = (load_file(tmp_path / world / "stages/aligned/model/model.safetensors") for world in ("1", "2"))
    assert one.keys() == two.keys()
    assert all(relative(two[name], tensor) < SAME for name, tensor in one.items())
    assert (tmp_path / "2" / "report" / "report.json").is_file()
    again = launch(engine, "-m", "daekit", "train", str(recipes[2]))
    assert "[aligned] complete, kept" in again.stdout
