"""A recipe whose three stages run on one 4-bit base: expert, student, and the student that goes on with its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daekit.models.loading import load_model
from daekit.recipe import Recipe, load_recipe_text
from daekit.recipe.schema import EvaluatedModel, ModelSpec
from daekit.runtime.data import DataBuilder
from daekit.runtime.models import ModelBuilder
from daekit.runtime.report import _teachers
from daekit.runtime.run import run_recipe
from tests.helpers import tiny
from tests.helpers.adapter_world import save_base

RECIPE = """
name: one-base
output_dir: OUT/run
sources:
  chat: {domain: general, path: OUT/general.jsonl, holdout: 4}
  shop: {domain: shop, path: OUT/shop.jsonl, holdout: 4}
stages:
  expert:
    type: sft
    student: &base {path: OUT/base, dtype: float32, quantization: 4bit}
    lora: &lora {r: 2, target_modules: [q_proj, down_proj]}
    data: [shop]
    trainer: &trainer {max_steps: 2, per_device_train_batch_size: 16, logging_steps: 1, save_steps: 1, learning_rate: 0.01,
                       gradient_checkpointing: true}
  student:
    type: kd
    student: *base
    lora: *lora
    teacher: {adapter: stage:expert}
    data: [chat]
    trainer: *trainer
  aligned:
    type: dae
    student: {adapter: stage:student}
    teachers: {shop: {adapter: stage:expert}}
    data: {shop: 0.5, chat: 0.5}
    trainer: *trainer
evaluation: {baseline: student, max_new_tokens: 2}
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe_text(RECIPE.replace("OUT", str(folder)), "one-base.yaml", overrides)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_merged_adapter_is_trained_whole_in_the_next_stage(checkpointing: bool, tmp_path: Path) -> None:
    """PEFT freezes the base of an adapter, also once it is merged: the next stages would train nothing, without a word."""
    save_base(tmp_path / "base")
    for seed, domain in enumerate(("general", "shop")):
        tiny.rows(24, seed=seed, domains=(domain,)).remove_columns("domain").to_json(tmp_path / f"{domain}.jsonl")
    stages = [
        "stages.expert.student={path: OUT/base, dtype: float32}",
        "stages.student={type: kd, student: stage:expert, teacher: OUT/base, data: [chat]}",
        "stages.aligned={type: dae, teachers: {shop: stage:expert}, data: {shop: 0.5, chat: 0.5}}",
        "stages.more={type: sft, data: [shop]}",
        "stages.again={type: sft, student: {path: OUT/run/stages/expert/model, dtype: float32}, data: [shop]}",
    ]
    written = [stage.replace("OUT", str(tmp_path)) for stage in stages]
    trainer = f"{{max_steps: 2, per_device_train_batch_size: 16, learning_rate: 0.01, gradient_checkpointing: {checkpointing}}}"
    whole = [stage.removesuffix("}") + f", trainer: {trainer}}}" for stage in written[1:]]
    run_recipe(recipe(tmp_path, written[0], *whole[:-1], "evaluation=null"))
    run_recipe(recipe(tmp_path, written[0], *whole, "evaluation=null"))
    folders = {name: tmp_path / "run" / "stages" / name / "model" for name in ("expert", "student", "aligned", "more", "again")}
    results = {name: load_model(ModelSpec(path=str(folder), dtype="float32")).state_dict() for name, folder in folders.items()}
    for start, stage in (("expert", "student"), ("student", "aligned"), ("aligned", "more"), ("expert", "again")):
        layers = [key for key in results[stage] if key.endswith("proj.weight")]
        assert layers and not any(torch.equal(results[stage][key], results[start][key]) for key in layers), stage


def test_all_stages_run_on_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base(tmp_path / "base")
    for seed, domain in enumerate(("general", "shop")):
        rows = tiny.rows(24, seed=seed, domains=(domain,)).remove_columns("domain")
        rows.to_json(tmp_path / f"{domain}.jsonl")
    loads: list[tuple[str, str | None]] = []
    for room in ("daekit.models.adapters", "daekit.runtime.models"):
        original = __import__(room, fromlist=["load_model"]).load_model

        def load(spec, *arguments, original=original, **how):  # type: ignore[no-untyped-def]
            loads.append((str(spec.path).rsplit("/", 2)[-2], spec.quantization))
            return original(spec, *arguments, **how)

        monkeypatch.setattr(f"{room}.load_model", load)
    run_recipe(recipe(tmp_path, "evaluation=null"))
    assert [quantization for _, quantization in loads] == ["4bit"] * 3  # once per stage
    models = {name: tmp_path / "run" / "stages" / name / "model" for name in ("expert", "student", "aligned")}
    sizes = {}
    for name, folder in models.items():
        saved = load_file(folder / "adapter_model.safetensors")
        sizes[name] = {key: value.shape for key, value in saved.items()}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert sizes["expert"] == sizes["student"] == sizes["aligned"]
    done = json.loads((tmp_path / "run" / "stages" / "aligned" / "stage.json").read_text())
    assert done["run"]["teacher"]["general"]["weights"] != done["run"]["teacher"]["shop"]["weights"]
    assert done["run"]["teacher"]["general"]["base"] == done["run"]["teacher"]["shop"]["base"]
    first = done["log_history"][0]
    assert first["kl/general"] == pytest.approx(0, abs=1e-6) and first["kl/shop"] > 0  # it starts from its own adapter

    run_recipe(recipe(tmp_path))
    assert "[aligned] complete, kept" in capsys.readouterr().out
    models_of_run = ModelBuilder(DataBuilder(recipe(tmp_path)))
    teachers = _teachers(models_of_run, EvaluatedModel(name="aligned", stage="aligned"), ["general", "shop"])
    said = {domain: teacher.identity() for domain, teacher in teachers.items() if not domain.startswith("//")}
    assert said == done["run"]["teacher"]  # the report's teachers are those of the training
    rows = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    measured = {(row["model"], row["domain"]): row["value"] for row in rows if row["metric"] == "kl_to_teacher"}
    assert measured.keys() == {(model, domain) for model in ("student", "aligned") for domain in ("general", "shop")}
