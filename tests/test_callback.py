"""A suite during training: its values are logged, and the training is the same to the bit with and without it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from daekit import EvaluationCallback, load_suite
from daekit.cli import main
from daekit.errors import UserError
from daekit.evaluation.likelihood.choices import MinimalPairs
from daekit.recipe.suite import MTBenchSpec
from tests.helpers import tiny
from tests.helpers.suite_world import build_world
from tests.helpers.trainer_world import sft


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def suite_of(world: Path, folder: Path, **changes):
    text = yaml.safe_load((world / "suite.yaml").read_text()) | {"baseline": None}
    text["benchmarks"]["general"] |= {"reference": None}
    text["benchmarks"] |= changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(text))
    return load_suite(path, need_models=False)


def trained(folder: Path, suite=None, steps=None, **changes):
    """(weights, log) of a run with dropout, of which each step's mask depends on the random state."""
    student = tiny.model(seed=1, attention_dropout=0.3)
    trainer = sft(folder, tiny.rows(32, seed=2), student, logging_steps=3, **changes)
    if suite is not None:
        trainer.add_callback(EvaluationCallback(trainer, suite, steps))
    trainer.train()
    return trainer.model.state_dict(), trainer.state.log_history


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime", "eval_samples_per_second")
TIMES += ("eval_steps_per_second",)


def training_log(history):
    """What the trainer itself logs, without the clock."""
    ours = ("blimp", "english", "quiz", "general")
    kept = []
    for entry in history:
        values = {key: value for key, value in entry.items() if key not in TIMES and key.partition("/")[2] not in ours}
        if set(values) - {"step", "epoch"}:
            kept.append(values)
    return kept


def test_the_training_is_the_same_to_the_bit(world, tmp_path, monkeypatch):
    suite = suite_of(world, tmp_path)
    measure = MinimalPairs.measure

    def careless(self, model, tokenizer, batch_size):
        torch.rand(3), random.random(), np.random.rand()
        return measure(self, model, tokenizer, batch_size)

    monkeypatch.setattr(MinimalPairs, "measure", careless)
    plain, plain_log = trained(tmp_path / "plain")
    weights, log = trained(tmp_path / "watched", suite, steps=2)
    assert all(torch.equal(plain[name], value) for name, value in weights.items())
    assert training_log(log) == training_log(plain_log)
    measured = [entry for entry in log if "eval_accuracy/blimp" in entry]
    assert [entry["step"] for entry in measured] == [2, 4, 6, 8]
    assert {"eval_bits_per_byte/english", "eval_perplexity/english", "eval_accuracy/quiz", "eval_exact_match/general"} <= set(
        measured[0]
    )
    assert measured[0]["eval_nll/english"] != measured[-1]["eval_nll/english"]
    other, _ = trained(tmp_path / "other", seed=7)
    assert not all(torch.equal(plain[name], value) for name, value in other.items())


def test_with_the_trainers_evaluation(world, tmp_path):
    suite = suite_of(world, tmp_path)
    evaluating = dict(eval_dataset=tiny.rows(8, seed=3), eval_strategy="steps", eval_steps=4)
    plain, plain_log = trained(tmp_path / "plain", **evaluating)
    weights, log = trained(tmp_path / "watched", suite, **evaluating)
    assert all(torch.equal(plain[name], value) for name, value in weights.items())
    assert training_log(log) == training_log(plain_log)
    assert [entry["step"] for entry in log if "eval_accuracy/blimp" in entry] == [4, 8]


def test_the_values_are_those_of_the_suite(world, tmp_path):
    suite = suite_of(world, tmp_path)
    student = tiny.model(seed=1)
    trainer = sft(tmp_path / "run", tiny.rows(16, seed=2), student)
    trainer.add_callback(EvaluationCallback(trainer, suite, steps=4))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (
        main(["eval", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out"), "--model", f"m={tmp_path / 'saved'}"])
        == 0
    )
    values = {
        (row["domain"], row["metric"]): row["value"] for row in json.loads((tmp_path / "out" / "report.json").read_text())
    }
    last = [entry for entry in trainer.state.log_history if "eval_accuracy/blimp" in entry][-1]
    logged = {key: value for key, value in last.items() if "/" in key}
    assert len(logged) > 8
    for key, value in logged.items():
        metric, _, domain = key.removeprefix("eval_").partition("/")
        assert value == pytest.approx(values[domain, metric], rel=1e-6), key


def test_modes_are_restored(world, tmp_path):
    trainer = sft(tmp_path, tiny.rows(8, seed=2))
    callback = EvaluationCallback(trainer, suite_of(world, tmp_path), steps=1)
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    before = [module.training for module in trainer.model.modules()]
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert [module.training for module in trainer.model.modules()] == before and len(set(before)) == 2


def test_what_cannot_be_measured_is_said_before_training(world, tmp_path):
    trainer = sft(tmp_path / "run", tiny.rows(8, seed=2))
    with pytest.raises(UserError, match="steps=0"):
        EvaluationCallback(trainer, suite_of(world, tmp_path), steps=0)
    suite = suite_of(world, tmp_path)
    with pytest.raises(UserError, match="no benchmark without a judge"):
        EvaluationCallback(trainer, suite.model_copy(update={"benchmarks": {"mt": MTBenchSpec(path="questions")}}))
    longer = suite_of(world, tmp_path, text={"type": "perplexity", "texts": {"english": str(world / "text.txt")}})
    with pytest.raises(UserError, match="1024 tokens are more than the 256"):
        EvaluationCallback(trainer, longer)
