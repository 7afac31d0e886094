"""The preflight of a dae stage: its figures are those of the models, and an expert that is not better is said loudly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from daekit.recipe import load_recipe_text, stage_key
from daekit.runtime import preflight
from daekit.runtime.run import run_recipe
from tests.helpers import tiny
from tests.helpers.cache_world import build_world
from tests.helpers.score_server import ScoreServer

RECIPE = """
name: preflight
output_dir: OUT/run
tokenizer: {path: OUT/base}
sources:
  general: {domain: general, path: OUT/general.jsonl}
  shop: {domain: shop, path: OUT/shop.jsonl, validation: OUT/valid.jsonl}
stages:
  dae:
    type: dae
    student: OUT/student
    teachers: {shop: OUT/good}
    data: [general, shop]
    trainer: {max_steps: 2, per_device_train_batch_size: 4, gradient_checkpointing: false, report_to: none, save_strategy: "no"}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose expert ``good`` has no preference, which is better than the random one of all others."""
    root = build_world(tmp_path_factory.mktemp("world"))
    good = tiny.model(seed=1)
    torch.nn.init.zeros_(good.lm_head.weight)
    good.save_pretrained(root / "good")
    tiny.tokenizer().save_pretrained(root / "good")
    rows = tiny.rows(20, seed=7)
    lines = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in rows]
    (root / "valid.jsonl").write_text("\n".join(lines))
    return root


def run(world: Path, out: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    """The facts of the stage."""
    tree = yaml.safe_load(RECIPE.replace("OUT", str(world)))
    tree["output_dir"] = str(out)
    tree["stages"]["dae"] |= changes
    run_recipe(load_recipe_text(yaml.safe_dump(tree), "preflight.yaml", overrides))
    return json.loads((out / "stages" / "dae" / "stage.json").read_text())


def plain_nll(model: PreTrainedModel, rows: Path) -> tuple[float, int]:
    """(mean NLL, tokens) of the completions and the end, row by row with whole logits."""
    tokenizer, total, tokens = tiny.tokenizer(), 0.0, 0
    for row in load_dataset("json", data_files=str(rows), split="train"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + " </s>")["input_ids"]
        with torch.no_grad():
            scores = model.eval()(torch.tensor([ids])).logits[0, :, : len(tokenizer)].log_softmax(-1)
        total -= sum(float(scores[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
        tokens += len(ids) - len(prompt)
    return total / tokens, tokens


def test_figures_are_those_of_the_models_and_a_good_expert_passes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run(world, tmp_path, reference={"path": f"{world}/base"})["preflight"]["shop"]
    for who, folder in {"expert": "good", "student": "student", "reference": "base"}.items():
        mean, tokens = plain_nll(AutoModelForCausalLM.from_pretrained(world / folder), world / "valid.jsonl")
        assert figures[who][0] == pytest.approx(mean, abs=1e-5) and figures["tokens"] == tokens
        assert figures[who][1] < mean < figures[who][2] or folder == "good"  # whose rows are all alike
    assert figures["better_by"][1] > 0 and figures["rows"] == 20
    said = capsys.readouterr().out
    assert "preflight on 20 held-out rows of shop" in said and "WARNING" not in said


def test_an_expert_that_is_not_better_is_said_loudly(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = "evaluation={models: [dae], sources: [shop], generate: false, bootstrap: 10}"
    facts = run(world, tmp_path, evaluation, student=f"{world}/good", teachers={"shop": f"{world}/expert"})
    figures, said = facts["preflight"]["shop"], capsys.readouterr().out
    assert figures["better_by"][1] <= 0
    words = "the expert of shop is not better than the student on held-out rows of its own domain"
    assert f"WARNING: {words}" in said and f"{figures['student'][0]:.3f}" in said
    assert words in (tmp_path / "report" / "report.md").read_text()


def test_the_student_itself_is_not_better_than_itself(world: Path, tmp_path: Path) -> None:
    figures = run(world, tmp_path, teachers={"shop": f"{world}/student"}, loss={"ce_weight": 0.1})["preflight"]["shop"]
    assert figures["better_by"] == pytest.approx([0, 0, 0], abs=1e-7) and len(preflight.warnings({"shop": figures})) == 1


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["hidden", {"keep": "top_k", "k": 12}])
def test_a_cached_expert_is_scored_from_its_cache(cache: Any, world: Path, tmp_path: Path) -> None:
    live = run(world, tmp_path / "live", teachers={"shop": f"{world}/expert"})["preflight"]["shop"]
    teachers = {"shop": {"path": f"{world}/expert", "cache": cache}}
    cached = run(world, tmp_path / "cached", teachers=teachers, reference={"cache": "hidden"})["preflight"]["shop"]
    assert cached["expert"] == pytest.approx(live["expert"], abs=1e-6 if cache == "hidden" else 3e-3)
    assert cached["student"] == live["student"]


@pytest.mark.slow
def test_a_served_expert_is_scored_through_the_server(world: Path, tmp_path: Path) -> None:
    live = run(world, tmp_path / "live", teachers={"shop": f"{world}/expert"})["preflight"]["shop"]
    model = AutoModelForCausalLM.from_pretrained(world / "expert")
    with ScoreServer(model, tiny.tokenizer()) as server:
        served = run(world, tmp_path / "served", teachers={"shop": {"base_url": server.url, "model": "big", "k": 12}})
    assert served["preflight"]["shop"]["expert"] == pytest.approx(live["expert"], abs=1e-4)


def test_an_expert_that_is_told_more_is_scored_with_what_it_is_told(world: Path, tmp_path: Path) -> None:
    told = [json.loads(line) | {"teacher_prompt": "w7 w8 w9 "} for line in (world / "valid.jsonl").read_text().splitlines()]
    other = [row | {"prompt": row["teacher_prompt"]} for row in told]
    for name, rows in {"told": told, "other": other}.items():
        text = "\n".join(json.dumps({key: row[key] for key in row if key != "answer"}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "shop.jsonl").write_text((tmp_path / "told.jsonl").read_text())
    source = f"sources.shop={{domain: shop, path: {tmp_path}/shop.jsonl, validation: {tmp_path}/told.jsonl}}"
    figures = run(world, tmp_path / "run", source, teachers={"shop": f"{world}/expert"})["preflight"]["shop"]
    for who, folder, rows_of in (("expert", "expert", tmp_path / "other.jsonl"), ("student", "student", world / "valid.jsonl")):
        mean, _ = plain_nll(AutoModelForCausalLM.from_pretrained(world / folder), rows_of)
        assert figures[who][0] == pytest.approx(mean, abs=1e-5)


def test_what_cannot_be_scored_says_why(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {"shop": {"path": f"{world}/expert", "cache": {"keep": "sampled"}}}
    figures = run(world, tmp_path / "drawn", teachers=drawn)["preflight"]["shop"]
    assert "do not name every label" in figures["not_scored"]
    nothing = run(world, tmp_path / "nothing", "sources.shop={domain: shop, path: " + f"{world}/shop.jsonl" + "}")
    assert "no validation rows" in nothing["preflight"]["shop"]["not_scored"]
    assert "[dae] preflight: the expert of shop is not scored: it has no validation rows" in capsys.readouterr().out


def test_it_changes_no_weight_and_can_be_left_out(world: Path, tmp_path: Path) -> None:
    lora = {"lora": {"r": 2, "lora_dropout": 0.1}}
    weights = []
    for name, changes in {"with": {}, "without": {"preflight": False}}.items():
        facts = run(world, tmp_path / name, **lora, **changes)
        assert ("preflight" in facts) is (name == "with")
        weights.append(load_file(tmp_path / name / "stages" / "dae" / "model" / "adapter_model.safetensors"))
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    recipe, without = (
        load_recipe_text(RECIPE.replace("OUT", str(world)), "r", o) for o in ([], ["stages.dae.preflight=false"])
    )
    assert stage_key(recipe, "dae") == stage_key(without, "dae")


@pytest.mark.slow
def test_a_resumed_stage_keeps_its_figures(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ["stages.dae.trainer.save_strategy=steps", "stages.dae.trainer.save_steps=1"]
    first = run(world, tmp_path, *saving)["preflight"]
    (tmp_path / "stages" / "dae" / "stage.json").unlink()
    monkeypatch.setattr(preflight, "_compare", lambda *_: pytest.fail("asked again"))
    assert run(world, tmp_path, *saving)["preflight"] == first


def test_rows_are_spread_and_short_enough(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ROWS", 3)
    rows = Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n, "domain": "shop"} for n in range(1, 12)])
    assert [len(row["input_ids"]) for row in preflight._some(rows, "shop", 10)] == [2, 6, 10]
    assert preflight._some(rows, "law", None) == []
