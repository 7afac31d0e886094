"""A recipe whose rows have a ``teacher_prompt``: sources, mixture, preview, plan, caches, training, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from daekit.data.sources import load_source
from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.planning.machine import Machine
from daekit.planning.training import training_of
from daekit.recipe import load_recipe_text, to_yaml
from daekit.recipe.schema import Recipe, SourceSpec
from daekit.runtime.prepare import prepare
from daekit.runtime.preview import preview
from daekit.runtime.run import run_recipe
from tests.helpers import tiny
from tests.helpers.trainer_world import weights

STAGES = """
name: told
output_dir: OUT/run
tokenizer: {path: OUT/base}
sources:
  general: {domain: general, path: OUT/general.jsonl, chat: true}
  shop: {domain: shop, path: OUT/shop.jsonl, validation: OUT/valid.jsonl, columns: {teacher_prompt: page}, chat: true}
stages:
  dae:
    type: dae
    student: OUT/base
    teachers: {shop: OUT/expert}
    data: [general, shop]
    trainer: &trainer {max_steps: 3, per_device_train_batch_size: 4, pad_to_multiple_of: 64, gradient_checkpointing: false,
                       max_length: 40, report_to: none, save_strategy: "no", learning_rate: 1.0e-3, eval_strategy: steps,
                       eval_steps: 3}
  sft:
    type: sft
    student: OUT/base
    data: [general, shop]
    trainer: *trainer
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("told")
    for seed, name in enumerate(("base", "expert")):
        tiny.model(seed=seed).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    for seed, (name, count) in enumerate({"general": 12, "shop": 9, "valid": 4}.items()):
        rows: list[dict[str, Any]] = [
            {key: row[key] for key in ("prompt", "completion")} for row in tiny.rows(count, seed=seed)
        ]
        if name != "general":
            rows = [row | {"page": "w30 w31 w32 " + row["prompt"]} if at % 3 else row for at, row in enumerate(rows)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def recipe(world: Path, out: Path, *overrides: str) -> Recipe:
    text = STAGES.replace("OUT/run", str(out)).replace("OUT", str(world))
    return load_recipe_text(text, "told.yaml", overrides)


def test_a_source_keeps_it_as_its_prompt_is(tmp_path: Path) -> None:
    def read(row: dict[str, Any], **spec: Any) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        return load_source("s", SourceSpec(domain="shop", path=str(tmp_path / "rows.jsonl"), **spec), 0)[0][0].get(
            "teacher_prompt"
        )

    pair = {"prompt": "a", "completion": "b", "page": "c"}
    message = [{"role": "user", "content": "c"}]
    assert read(pair) is None
    assert read(pair, columns={"teacher_prompt": "page"}) == "c"
    assert read(pair, columns={"teacher_prompt": "page"}, chat=True) == message
    assert read(pair, columns={"teacher_prompt": "{page}\n{prompt}: {}"}) == "c\na: {}"
    assert read({"messages": [*message, {"role": "assistant", "content": "b"}], "teacher_prompt": "c"}) == message
    with pytest.raises(UserError, match=r"columns\.teacher_prompt: no row has '\{pgae\} \{prompt\}'"):
        read(pair, columns={"teacher_prompt": "{pgae} {prompt}"})
    for bad, words in (
        ({"text": "a", "teacher_prompt": "c"}, "is text with a teacher_prompt"),
        ({"prompt": "a", "completion": "b", "teacher_prompt": message}, "both must be of one kind"),
        ({"prompt": "a", "completion": "b", "teacher_prompt": " "}, "empty teacher_prompt"),
        ({"prompt": "a", "completion": "b", "teacher_prompt": 3}, "which must be a string"),
    ):
        with pytest.raises(UserError, match=words):
            read(bad)


def test_both_sides_are_shown_and_the_longer_counts(world: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe(world, tmp_path / "run"))
    shown = preview(prepared, rows=3, colour=False)
    assert "row 1 of shop as its teacher sees it" not in shown
    assert "--- row 2 of shop as its teacher sees it" in shown
    assert "teachers see 6 rows with a teacher_prompt" in shown
    told = shown.split("--- row 2 of shop as its teacher sees it")[1].split("---")[0]
    assert "w30 w31 w32" in told and "{+" in told
    assert TEACHER_PROMPT_IDS in prepared.stages["dae"].mixture.dataset.column_names
    assert TEACHER_PROMPT_IDS not in prepared.stages["sft"].mixture.dataset.column_names
    with pytest.raises(UserError, match=r"stages\.dae\.data: .*rows have more than teacher_max_length=12 \(default"):
        prepare(recipe(world, tmp_path / "run", "stages.dae.teacher_max_length=12"))
    with pytest.raises(UserError, match=r"stages\.dae\.data: attention_weight=1\.0: rows have a teacher_prompt"):
        prepare(recipe(world, tmp_path / "run", "stages.dae.loss.attention_weight=1"))
    with pytest.raises(UserError, match="splits rows"):
        prepare(
            recipe(world, tmp_path / "run", "stages.dae.trainer.packing=true", "stages.dae.trainer.packing_strategy=wrapped")
        )


def test_the_plan_and_the_written_recipe_know_the_teachers_length(world: Path, tmp_path: Path) -> None:
    longer = recipe(world, tmp_path, "stages.dae.teacher_max_length=90")
    machine = Machine(memory=2**30, gpu=False)
    assert [training_of(longer.stages[name], name, machine).teacher_length for name in ("dae", "sft")] == [90, 40]
    assert load_recipe_text(to_yaml(longer), "told.yaml").stages["dae"] == longer.stages["dae"]
    with pytest.raises(UserError, match="an sft stage has no teacher"):
        recipe(world, tmp_path, "stages.sft.teacher_max_length=90")


def test_a_run_from_caches_is_the_live_run_to_the_bit_and_its_report_measures_what_taught(world: Path, tmp_path: Path) -> None:
    cached = [
        "stages.dae.teachers.shop={path: " + str(world / "expert") + ", cache: hidden}",
        "stages.dae.reference={cache: hidden}",
    ]
    report = "evaluation={models: [dae], sources: [shop], generate: false, bootstrap: 10}"
    for name, overrides in (("live", [report]), ("cached", [*cached, report])):
        run_recipe(recipe(world, tmp_path / name, *overrides))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "stages/dae/model") for name in ("live", "cached")]
    assert torch.equal(weights(models[0]), weights(models[1]))
    values = [json.loads((tmp_path / name / "report/report.json").read_text()) for name in ("live", "cached")]
    metrics = {row["metric"]: row["value"] for row in values[0] if row["domain"] == "shop"}
    assert metrics["kl_to_teacher"] > 0
    done = json.loads((tmp_path / "live/stages/dae/stage.json").read_text())
    evaluated = [entry["eval_kl"] for entry in done["log_history"] if "eval_kl" in entry][-1]
    assert metrics["kl_to_teacher"] == pytest.approx(evaluated, rel=1e-4)
