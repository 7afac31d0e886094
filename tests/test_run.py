"""A whole recipe: stages in order, kept when complete, resumed when stopped, refused when changed, reported at the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from daekit.errors import UserError
from daekit.recipe import load_recipe_text
from daekit.recipe.objective import Objective
from daekit.recipe.schema import ModelSpec, Recipe, TeacherSpec
from daekit.runtime.run import calibration, run_recipe

RECIPE = """
name: small
output_dir: OUT
tokenizer: {train: {vocab_size: 400, kind: words}}
sources:
  skills: {domain: general, path: "builtin:skills", validation: "builtin:skills", limit: 200, validation_limit: 6}
  chat: {domain: general, path: "builtin:chat", limit: 100}
  shop: {domain: shop, path: "builtin:shop", validation: "builtin:shop", limit: 60, validation_limit: 6}
stages:
  teacher:
    type: sft
    student: {config: &mixtral {model_type: mixtral, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1, num_local_experts: 2, num_experts_per_tok: 1}}
    data: [skills]
    trainer: &trainer {max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 2,
                       gradient_checkpointing: false}
  student:
    type: kd
    student: {config: {model_type: mistral, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1}}
    teacher: {ensemble: [{model: "stage:teacher", weight: 0.5}, {model: {config: *mixtral}, weight: 0.5}]}
    data: [skills]
    trainer: *trainer
  aligned:
    type: dae
    teachers: {shop: "stage:teacher"}
    data: {shop: 0.5, chat: 0.5}
    lora: {r: 2, merge: MERGE}
    trainer: *trainer
evaluation: {baseline: student, max_new_tokens: 4}
"""


def recipe(out: Path, *overrides: str, merge: bool = False) -> Recipe:
    text = RECIPE.replace("OUT", str(out)).replace("MERGE", str(merge).lower())
    return load_recipe_text(text, "small.yaml", overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run_recipe(recipe(out))
    return out


def test_the_report_has_every_model_and_domain(finished: Path) -> None:
    rows = json.loads((finished / "report" / "report.json").read_text())
    assert all(row.keys() == {"model", "domain", "metric", "value", "low", "high", "n"} for row in rows)
    measured = {(row["model"], row["domain"], row["metric"]) for row in rows}
    for model in ("teacher", "student", "aligned"):
        for domain in ("general", "shop"):
            for metric in ("nll", "perplexity", "token_accuracy", "exact_match", "answer_match"):
                assert (model, domain, metric) in measured
    assert {("student", "general", "kl_to_teacher"), ("aligned", "shop", "kl_to_teacher")} <= measured
    assert ("teacher", "shop", "kl_to_teacher") not in measured
    assert (finished / "report" / "report.html").is_file()


def test_provenance_lies_beside_the_weights(finished: Path) -> None:
    folder = finished / "stages" / "aligned" / "model"
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["versions"].keys() >= {"torch", "transformers", "trl"}
    assert facts["run"]["teacher"].keys() == {"general", "shop"}
    assert facts["run"]["data"] and facts["mixture"][0]["used"] == facts["mixture"][1]["used"]
    assert (folder / "recipe.yaml").is_file() and (folder / "adapter_model.safetensors").is_file()
    assert not list(finished.rglob("training_args.bin"))


def test_a_complete_run_is_kept(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    run_recipe(recipe(finished))
    assert capsys.readouterr().out.count("complete, kept") == 4
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


def test_a_stage_that_lost_its_end_is_resumed_to_the_same_weights(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = finished / "stages" / "student"
    straight = load_file(stage / "model" / "model.safetensors")
    (stage / "stage.json").unlink()  # stopped after the last checkpoint, before the stage was declared complete
    run_recipe(recipe(finished))
    assert "resumed at step 3/3" in capsys.readouterr().out
    resumed = load_file(stage / "model" / "model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in straight.items())


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("stages.teacher.trainer.learning_rate=1e-3", "stage.trainer.learning_rate: "),
        ("name=other", "recipe 'small'"),
        ("sources.skills.limit=190", "sources.skills.limit"),
    ],
)
def test_another_recipes_run_is_left_alone(finished: Path, override: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        run_recipe(recipe(finished, override))


def test_a_merged_stage_is_a_plain_model(tmp_path: Path) -> None:
    small = recipe(tmp_path / "run", merge=True)
    run_recipe(small.model_copy(update={"evaluation": None}))
    folder = tmp_path / "run" / "stages" / "aligned"
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_on_an_adapter_keeps_both(tmp_path: Path) -> None:
    small = recipe(tmp_path / "run")
    teachers = {"shop": TeacherSpec(model=ModelSpec(stage="teacher"))}
    loss = Objective(ce_weight=1.0)  # its teachers are the student itself
    changes = {"student": ModelSpec(stage="teacher"), "teachers": teachers, "loss": loss}
    first = small.stages["aligned"].model_copy(update=changes)
    second = first.model_copy(update={"student": ModelSpec(stage="first")})
    stages = {"teacher": small.stages["teacher"], "first": first, "second": second}
    run_recipe(small.model_copy(update={"stages": stages, "evaluation": None}))
    folder = tmp_path / "run" / "stages"
    base = json.loads((folder / "second" / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == (folder / "first" / "model").resolve()


def test_a_report_of_other_rows_is_made_anew(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe(finished, "sources.shop.validation_limit=5"))
    assert "[report] evaluating" in capsys.readouterr().out


def test_a_tokenizer_of_other_settings_is_not_used(tmp_path: Path) -> None:
    small = recipe(tmp_path).model_copy(update={"stages": {}, "evaluation": None})
    run_recipe(small)
    (tmp_path / "students" / "made").mkdir(parents=True)
    (tmp_path / "students" / "made" / "student.json").write_text("{}")  # it was used
    assert small.tokenizer is not None and small.tokenizer.train is not None
    train = small.tokenizer.train.model_copy(update={"vocab_size": 399})
    other = small.model_copy(update={"tokenizer": small.tokenizer.model_copy(update={"train": train})})
    with pytest.raises(UserError, match="other settings"):
        run_recipe(other)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("logging_steps=0", "stages.teacher.trainer: .*logging_steps"),  # by the config
        ("report_to=wandbb", "stages.teacher.trainer: wandbb is not supported"),  # by the Trainer
        ("padding_free=true", "stages.teacher.trainer: padding_free"),  # by daekit, of what TRL takes
    ],
)
def test_what_the_libraries_refuse_names_the_stage(override: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=wanted):
        run_recipe(recipe(tmp_path, f"stages.teacher.trainer.{override}"))


def test_calibration_says_how_fast_the_machine_is() -> None:
    assert "ms" in calibration() and "GFLOP/s" in calibration()


@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer/trained_on.json", "stages/student/stage_key.json"])
@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_file_of_the_run_is_named(name: str, content: str, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name.split('/')[-1]}.*damaged"):
        run_recipe(recipe(copy))


def test_an_output_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output_dir: .*/file' is a file, not a directory"):
            recipe(out)


def test_a_suite_is_the_last_stage(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    quiz = tmp_path / "pairs.jsonl"
    quiz.write_text('{"sentence_good": "two plus two is 4", "sentence_bad": "two plus 4 two is"}\n')
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"name: after\noutput_dir: elsewhere\nbenchmarks:\n  pairs: {{type: minimal_pairs, path: {json.dumps(str(quiz))}}}\n"
    )
    run_recipe(recipe(out, f"evaluation.suites=[{json.dumps(str(suite))}]"))
    rows = json.loads((out / "suites" / "after" / "report.json").read_text())
    assert {row["model"] for row in rows} == {"teacher", "student", "aligned"}
    assert {row["metric"] for row in rows if row["model"] != "student"} == {"accuracy", "accuracy_gain"}
    assert not Path("elsewhere").exists()


def test_a_suite_that_cannot_be_read_is_told_with_the_recipe(tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    for text, says in (
        ("name: x\noutput_dir: y\nbenchmarks: {p: {type: minimal_pair}}", "did you mean 'minimal_pairs'?"),
        (
            "name: x\noutput_dir: y\nbenchmarks: {p: {type: minimal_pairs, path: .}}\nmodels: {student: a/b}",
            "rename one of them",
        ),
        (
            "name: x\noutput_dir: y\nbenchmarks: {p: {type: minimal_pairs, path: .}}\nbaseline: nobody",
            "there is no model 'nobody'",
        ),
    ):
        suite.write_text(text)
        with pytest.raises(UserError, match=re.escape(says)):
            recipe(tmp_path, f"evaluation.suites=[{json.dumps(str(suite))}]")
    with pytest.raises(UserError, match="cannot be read"):
        recipe(tmp_path, "evaluation.suites=[nowhere.yaml]")
