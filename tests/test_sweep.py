"""A sweep is its runs, one by one: equal weights; what they share is trained once; seeds become means with intervals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from daekit.cli import main
from daekit.errors import UserError
from daekit.report import Row
from daekit.runtime.sweep import _values, mean_over_seeds, pareto_notes, swept_runs
from tests.helpers.processes import forked
from tests.helpers.run_world import during_step

RECIPE = """
name: small
output_dir: OUT
tokenizer: {train: {vocab_size: 300, kind: words}}
sources:
  skills: {domain: general, path: "builtin:skills", validation: "builtin:skills", limit: 20, validation_limit: 4}
stages:
  base: &stage
    type: sft
    seed: 5
    student: {config: {model_type: mistral, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1}}
    data: [skills]
    trainer: &trainer {max_steps: 3, per_device_train_batch_size: 4, save_steps: 100, learning_rate: 0.01,
                       lr_scheduler_type: constant, gradient_checkpointing: false}
  second: {type: sft, seed: 0, student: "stage:base", data: [skills], trainer: *trainer}
evaluation: {baseline: base, max_new_tokens: 2, bootstrap: 10}
"""
RATES, SEEDS = ("0.01", "0.003"), ("0", "1")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", json.dumps(str(tmp_path / "out"))))
    return path


def weights(run: Path, stage: str) -> dict[str, Tensor]:
    return load_file(run / "stages" / stage / "model" / "model.safetensors")


def sweep(recipe: Path) -> int:
    rates, seeds = (f"stages.second.{key}" for key in ("trainer.learning_rate", "seed"))
    return main(["sweep", str(recipe), f"{rates}={','.join(RATES)}", f"{seeds}={','.join(SEEDS)}"])


def test_a_sweep_that_was_killed_ends_as_its_runs_one_by_one(recipe: Path, tmp_path: Path) -> None:
    def killed() -> int:
        counts = iter(range(100))
        during_step(2, lambda: os._exit(9) if next(counts) == 2 else None)  # in the second stage of the second run
        return sweep(recipe)

    assert forked(killed, tmp_path / "first.txt") == 9, (tmp_path / "first.txt").read_text()
    assert forked(lambda: sweep(recipe), tmp_path / "again.txt") == 0, (tmp_path / "again.txt").read_text()
    runs = tmp_path / "out" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == sorted(
        f"learning_rate_{rate}_seed_{seed}" for rate in RATES for seed in SEEDS
    )
    assert len({(path / "stages/base/model/model.safetensors").stat().st_ino for path in runs.iterdir()}) == 1
    swept = runs / "learning_rate_0.003_seed_1"
    alone = [
        "output_dir=" + json.dumps(str(tmp_path / "alone")),
        "stages.second.trainer.learning_rate=0.003",
        "stages.second.seed=1",
    ]
    assert forked(lambda: main(["train", str(recipe), *alone])) == 0
    for stage in ("base", "second"):
        ours, theirs = weights(swept, stage), weights(tmp_path / "alone", stage)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other = weights(runs / "learning_rate_0.003_seed_0", "second")
    assert any(not torch.equal(other[key], value) for key, value in weights(swept, "second").items())
    for page in ("report.md", "report.html"):
        assert "from Student" in (tmp_path / "out/report" / page).read_text()
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    nll = {row["model"]: row for row in report if row["metric"] == "nll"}
    assert list(nll) == ["base", "second · learning_rate=0.01", "second · learning_rate=0.003"]
    single = [json.loads((runs / f"learning_rate_0.01_seed_{seed}" / "report/report.json").read_text()) for seed in SEEDS]
    values = [row["value"] for rows in single for row in rows if (row["model"], row["metric"]) == ("second", "nll")]
    mean, half = sum(values) / 2, 12.7062 * abs(values[0] - values[1]) / 2  # t(0.975, 1) * s / sqrt(2)
    row = nll["second · learning_rate=0.01"]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((mean, mean - half, mean + half), rel=1e-4)


def test_values_between_commas(recipe: Path) -> None:
    _, runs = swept_runs(str(recipe), ["seed=0,1", 'stages.second.trainer.optim_args="a=1,b=2"', "sources.skills.limit=5"])
    assert [run.settings for run in runs] == [{"seed": "0"}, {"seed": "1"}] and [run.knobs for run in runs] == [{}, {}]
    assert runs[0].recipe.stages["second"].trainer["optim_args"] == "a=1,b=2" and runs[1].recipe.seed == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4, 1e-5", ["1e-4", "1e-5"]),
        ("[[0, 1], [2, 3]],uniform", ["[[0, 1], [2, 3]]", "uniform"]),
        ("{a: {b: 1}, c: 2}, {a: 'x, y}'}", ["{a: {b: 1}, c: 2}", "{a: 'x, y}'}"]),
        (r'"a\", b",c', [r'"a\", b"', "c"]),
        ("'it''s, so',c", ["'it''s, so'", "c"]),
        ("model.layers.[0-9]{1,2}.q_proj, k_proj", ["model.layers.[0-9]{1,2}.q_proj", "k_proj"]),
        ("don't, o'clock, f(x[0])", ["don't", "o'clock", "f(x[0])"]),
        ("", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_part_nothing(text: str, values: list[str]) -> None:
    assert _values(text) == values


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "no key has several values"),
        (["seed"], "'seed' is not of the form key.sub=value"),
        (["seed="], "no key has several values; seed has none"),
        (["seed=1,,2"], "seed=1,,2: one of the values between its commas is empty"),
        (["seed=1,"], "one of the values between its commas is empty"),
        (["seed=,"], "one of the values between its commas is empty"),
        (["stages.second.data=[skills,[skills]"], r"data=\[skills,\[skills\]: it has \[ without its other"),
        (["stages.second.data=[skills},[skills]"], r"it has } where \[ is open"),
        (["seed=1,2", "seed=3"], r"seed is given twice \(seed=1,2 and seed=3\); write all its values behind one"),
        (["seed=1,2", "seed=3,4"], "seed is given twice"),
        (["name=a,b"], "name=a and name=b are the same run.*its name and output_dir do not"),
        (["seed=1"], "no key has several values"),
        (["seed=1,1"], "twice"),
        (["stages.second.trainer.learning_rate=1e-3,often"], "often"),
        (["stages.secund.seed=1,2"], "second"),
        (["seed=0,1", "stages.second.trainer.learning_rate"], "is not of the form key.sub=value"),
        (["seed=0,1", "stages.second.trainer.learning_rate="], "learning_rate"),
        (["stages.second.trainer.learning_rate=1e-3,0.001"], "learning_rate=1e-3 and learning_rate=0.001 are the same run"),
        (["output_dir=a,b"], "output_dir=a and output_dir=b are the same run"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        swept_runs(str(recipe), overrides)


def test_what_no_seed_changes_keeps_the_interval_over_rows() -> None:
    assert mean_over_seeds([Row("base", "shop", "nll", 2.0, 1.5, 2.5, 9)] * 3) == (2.0, 1.5, 2.5)


def test_the_pareto_front_holds_what_no_other_beats_in_both() -> None:
    def rows(model: str, gain: float, forgetting: float) -> list[Row]:
        return [
            Row(model, "shop", "nll_gain", gain, gain, gain, 9),
            Row(model, "general", "nll_forgetting", forgetting, forgetting, forgetting, 9),
        ]

    points = [*rows("a", 1.0, 0.5), *rows("b", 0.5, 0.1), *rows("c", 0.4, 0.2), *rows("d", 1.0, 0.5)]
    points += rows("e", 1.0, 0.6)  # gains as much as the best and forgets more
    (note,) = pareto_notes(points)
    assert note.endswith(": a; b; d.")
