"""The study of two experts: its contestants have one budget, its own arithmetic is right, its smallest setting runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from daekit.evaluation import tokenize_rows
from daekit.models.scoring import score_rows
from daekit.recipe import Recipe, load_recipe
from daekit.teachers import EnsembleTeacher, ModelTeacher
from tests.helpers.shared_data import DATA
from tests.helpers.tiny import WORDS, model, rows, tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(name="study")
def _study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import experts_study

    return experts_study


@pytest.fixture(name="recipes")
def _recipes(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for family in study.FAMILIES:
        Path(f"data/{family}-train.jsonl").touch()
    for name in ("student", "numbers-expert", "shop-expert"):  # as the study's first recipe leaves them
        Path(f"teachers/stages/{name}/model").mkdir(parents=True)
    return {name: load_recipe(study.RECIPES / f"{name}.yaml") for name in ("teachers", "contestants")}


def test_every_contestant_has_the_same_rows_options_and_start(study: ModuleType, recipes: dict[str, Recipe]) -> None:
    stages = recipes["contestants"].stages
    assert tuple(stages) == study.CONTESTANTS and tuple(recipes["teachers"].stages) == study.TEACHERS
    budgets = {}
    for name, stage in stages.items():
        assert stage.trainer == stages["routed"].trainer and stage.student is not None
        before = stages[stage.student.stage] if "-then-" in name and stage.student.stage else None
        assert before is not None or stage.student == stages["routed"].student
        if name.endswith("-first"):
            continue
        budget: Counter[str] = Counter()
        for each in (part for part in (before, stage) if part is not None):
            shares = dict(zip(each.data.sources, each.data.weights, strict=True))
            budget.update({source: round(share * (each.data.rows or 0)) for source, share in shares.items()})
        budgets[name] = dict(budget)
    assert len(budgets) == 8
    assert all(budget == budgets["routed"] for budget in budgets.values()), budgets


def test_merged_weights_are_the_mean(study: ModuleType, tmp_path: Path) -> None:
    models = [model(seed=seed) for seed in range(2)]
    for seed, each in enumerate(models):
        each.save_pretrained(tmp_path / str(seed))
        tokenizer().save_pretrained(tmp_path / str(seed))
    study.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    merged = study.load_model(study.ModelSpec(path=str(tmp_path / "merged"))).state_dict()
    first, second = (each.state_dict() for each in models)
    assert merged.keys() == first.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)


def test_nll_of_an_ensemble_is_that_of_the_mean_of_the_logits(study: ModuleType) -> None:
    models = [model(seed=seed).eval() for seed in range(2)]
    sets = tokenize_rows(rows(5), tokenizer(), source="s", domain="d")
    teachers = [ModelTeacher(each, len(WORDS)) for each in models]
    values = study.nll_of(EnsembleTeacher(teachers), sets)
    for at, row in enumerate(sets.rows):
        with torch.no_grad():
            logits = sum(each(input_ids=torch.tensor([row.input_ids])).logits[0] for each in models) / 2
        log_p = logits[:-1, : len(WORDS)].double().log_softmax(-1)
        expected = [-log_p[place, label].item() for place, label in enumerate(row.labels[1:]) if label != -100]
        assert (values.total_R[at], values.weight_R[at]) == (pytest.approx(sum(expected), rel=1e-5), len(expected))
    alone = score_rows(models[0], [{"input_ids": r.input_ids, "labels": r.labels} for r in sets.rows], vocab_size=len(WORDS))
    assert study.nll_of(teachers[0], sets).total_R == pytest.approx(alone.nll_R, rel=1e-5)


def test_tables_show_means_and_how_many_seeds_agree(study: ModuleType) -> None:
    def of_seed(nll: float, low: float, high: float) -> dict[str, Any]:
        differences = {name: [["routed", "shop", "nll", nll, low, high]] for name in study.PAIRS}
        return {"rows": [["routed", "shop", "nll", nll, 0.0, 9.0]], "differences": differences}

    text = study.tables({0: of_seed(1.0, 0.5, 1.5), 1: of_seed(2.0, -0.5, 4.5), 2: of_seed(-4.5, -5.0, -4.0)})
    assert "| routed |  | -0.500 (-4.500 to 2.000) |  |  |  |" in text
    assert text.count("| routed |  | -0.500 (1/1) |  |  |  |") == len(study.PAIRS)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_smallest_setting_runs(tmp_path: Path, study: ModuleType) -> None:
    options = ["--data", str(DATA), "--work", str(tmp_path), "--seeds", "0", "--small"]
    outputs = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    command = [sys.executable, str(ROOT / "benchmarks/experts_study.py"), *options, *outputs]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["0"]
    assert {row[0] for row in found["rows"]} == {*study.TEACHERS, *study.CONTESTANTS, "merged teacher", "ensemble teacher"}
    assert found["stages"].keys() == {*study.TEACHERS, *study.CONTESTANTS}
    assert found["differences"].keys() == study.PAIRS.keys()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert all(f"| {name} |" in done.stdout for name in study.CONTESTANTS)
