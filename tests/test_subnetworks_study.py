"""The study of students that begin as a part of their teacher: its starts have one budget, its arithmetic is right, it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from daekit.recipe import Recipe, load_recipe
from daekit.students.shapes import Shape, count_parameters
from tests.helpers.shared_data import DATA

ROOT = Path(__file__).resolve().parent.parent
NOVELS = DATA / "novels"


@pytest.fixture(name="study")
def _study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import subnetworks_study

    return subnetworks_study


@pytest.fixture(name="recipes")
def _recipes(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in (*study.ROWS, "validation"):
        Path(f"data/{name}.jsonl").touch()
    Path("teacher/stages/teacher-longer/model").mkdir(parents=True)  # as the study's first recipe leaves it
    return {name: load_recipe(study.RECIPES / f"{name}.yaml") for name in ("teacher", "students")}


def test_starts_differ_in_nothing_but_the_start(study: ModuleType, recipes: dict[str, Recipe]) -> None:
    stages = recipes["students"].stages
    assert set(stages) == {f"{start}-{way}" for start in study.STARTS for way in study.WAYS}
    for start in study.STARTS:
        ce, kd = stages[f"{start}-ce"], stages[f"{start}-kd"]
        assert ce.student == kd.student and (ce.type, kd.type) == ("sft", "kd")
        for mine, like in ((ce, stages["random-ce"]), (kd, stages["random-kd"])):
            assert (mine.trainer, mine.data, mine.loss) == (like.trainer, like.data, like.loss)
            assert mine.teachers_by_key() == like.teachers_by_key()
    init = stages["searched-ce"].student.init  # type: ignore[union-attr]
    assert init == stages["searched-kd"].student.init  # type: ignore[union-attr]


def test_all_starts_have_one_size(recipes: dict[str, Recipe]) -> None:
    teacher = recipes["teacher"].stages["teacher"].student
    stages = recipes["students"].stages
    students = {start: stages[f"{start}-ce"].student for start in ("random", "first", "importance", "searched")}
    vocabulary = {"vocab_size": recipes["teacher"].tokenizer.train.vocab_size}  # type: ignore[union-attr]
    config = AutoConfig.for_model(**(vocabulary | teacher.config))  # type: ignore[union-attr, operator]
    alone = AutoConfig.for_model(**(vocabulary | students["random"].config))  # type: ignore[union-attr, operator]
    size = count_parameters(alone)
    for start in ("first", "importance"):
        shape = Shape(**(vars(Shape.of(config)) | students[start].init.shape))  # type: ignore[union-attr]
        assert shape == Shape.of(alone) and count_parameters(config, shape) == size
    low, high = students["searched"].init.search.parameters  # type: ignore[union-attr]
    assert 0.94 * size <= low <= size <= high <= 1.01 * size


def test_tokens_to_reach_a_level_lie_on_the_line_between_evaluations(study: ModuleType) -> None:
    points = [[0, 6.0], [100, 4.0], [200, 5.0], [300, 3.0]]
    assert study.tokens_to_reach(points, 5.0) == 50
    assert study.tokens_to_reach(points, 7.0) == 0
    assert study.tokens_to_reach(points, 3.5) == 275
    assert study.tokens_to_reach(points, 3.0) == 300
    assert study.tokens_to_reach(points, 2.0) is None


def test_operations_are_counted_by_hand(study: ModuleType) -> None:
    result: dict[str, Any] = {
        "teacher_parameters": 100,
        "importance_tokens": 7,
        "students": {
            "random-kd": {"0": {"parameters": 10, "made": [], "curve": [[0, 6.0], [100, 2.0]]}},
            "searched-kd": {"0": {"parameters": 9, "made": [{"search": {"tokens": 50}}], "curve": [[0, 4.0], [100, 0.0]]}},
        },
    }
    assert study.operations(result, "random-kd", "0", 3) == ((6 * 10 + 2 * 100) * 3, 0)
    made = 2 * 100 * 7 + 2 * 9 * 50
    assert study.operations(result, "searched-kd", "0", 3) == ((6 * 9 + 2 * 100) * 3, made)
    random, searched = list(study._savings(result, "random-kd"))[2:]
    assert "| random-kd | 0 | 100 | 1.00x |" in random and "| 1.00x | 1.00x |" in random
    all_in = 26000 / (254 * 50 + made)
    assert "| searched-kd | 0 | 50 | 2.00x |" in searched and f"| {26000 / 12700:.2f}x | {all_in:.2f}x |" in searched


def test_the_rate_is_chosen_for_each_kind_of_start(study: ModuleType, tmp_path: Path) -> None:
    for start, best in (("random", 3e-3), ("importance", 1e-3)):
        for rate in study.RATES:
            stage = study.rate_name(start, rate)
            folder = tmp_path / f"sweep-{start}/stages/{stage}"
            folder.mkdir(parents=True)
            log = [{"step": 1, "eval_ce/novels": 0.1}, {"step": 2, "eval_ce/novels": 1.0 if rate == best else 2.0}, {"step": 2}]
            (folder / "stage.json").write_text(json.dumps({"log_history": log}))
        trainer = {"trainer": {"per_device_train_batch_size": 2, "max_length": 8}}
        recipe = {"stages": {study.rate_name(start, rate): trainer for rate in study.RATES}}
        (tmp_path / f"sweep-{start}/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert study.best_rates(tmp_path) == {"random": 3e-3, "cut": 1e-3}
    assert study.curve(tmp_path / "sweep-random", study.rate_name("random", 3e-3)) == [[16, 0.1], [32, 1.0]]
    rates = study.best_rates(tmp_path)
    for start in study.STARTS:
        recipe = study.student(start, 5, rates)
        assert set(recipe["stages"]) == {f"{start}-ce", f"{start}-kd"} and recipe["seed"] == 5
        wanted = 3e-3 if start in ("random", "wide") else 1e-3
        assert {stage["trainer"]["learning_rate"] for stage in recipe["stages"].values()} == {wanted}


@pytest.mark.slow
@pytest.mark.skipif(not NOVELS.is_dir(), reason="the shared data are not here")
def test_smallest_setting_runs(tmp_path: Path) -> None:
    options = ["--data", str(NOVELS), "--work", str(tmp_path), "--seeds", "0", "--jobs", "2", "--small"]
    outputs = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    command = [sys.executable, str(ROOT / "benchmarks/subnetworks_study.py"), *options, *outputs]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["students"]) == 10 and all(len(runs["0"]["curve"]) == 3 for runs in found["students"].values())
    assert (tmp_path / "out.svg").stat().st_size > 10_000
