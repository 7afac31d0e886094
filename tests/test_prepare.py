"""Before the first step everything is opened: what a run would stumble over later is told at once, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from daekit.cli import main
from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.recipe import load_recipe_text
from daekit.recipe.schema import Recipe
from daekit.runtime import disk
from daekit.runtime.data import DataBuilder
from daekit.runtime.disk import checkpoints_at_end
from daekit.runtime.folders import RunFolder
from daekit.runtime.models import ModelBuilder
from daekit.runtime.positions import learned_positions
from daekit.runtime.prepare import prepare
from daekit.runtime.preview import preview
from daekit.runtime.run import run_recipe
from daekit.runtime.student import require_one_process
from daekit.runtime.trainer import training_arguments
from tests.helpers import tiny
from tests.helpers.adapter_world import save_base

RECIPE = """
name: deep
output_dir: OUT/run
sources:
  chat: {domain: general, path: OUT/general.jsonl, holdout: 4}
  shop: {domain: shop, path: OUT/shop.jsonl, holdout: 4}
stages:
  expert:
    type: sft
    student: OUT/base
    lora: {r: 2, target_modules: [q_proj]}
    data: [shop]
    trainer: &trainer {max_steps: 2, max_length: 64, per_device_train_batch_size: 4, logging_steps: 1,
                       gradient_checkpointing: false}
  aligned:
    type: dae
    student: OUT/base
    lora: {r: 2, target_modules: [q_proj]}
    teachers: {shop: {adapter: "stage:expert"}}
    data: {shop: 0.5, chat: 0.5}
    trainer: *trainer
  cut:
    type: kd
    student: {from: OUT/base, shape: {num_hidden_layers: 1}, calibration: {tokens: 140, sources: [chat]}}
    teacher: OUT/teacher
    data: [chat]
    trainer: *trainer
evaluation: {max_new_tokens: 2, limit: 2}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    save_base(world / "base")
    shutil.copytree(world / "base", world / "teacher")
    for seed, domain in enumerate(("general", "shop")):
        tiny.rows(24, seed=seed, domains=(domain,)).remove_columns("domain").to_json(world / f"{domain}.jsonl")
    return world


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def recipe(world: Path, *overrides: str) -> Recipe:
    text = RECIPE.replace("OUT", str(world))
    return load_recipe_text(text, "deep.yaml", [each.replace("OUT", str(world)) for each in overrides])


def put(name: str, *rows: object) -> Callable[[Path], object]:
    """Write other rows into a file of the world."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return lambda world: (world / name).write_text(text)


def change(name: str, **fields: object) -> Callable[[Path], object]:
    """Change fields of a JSON file of the world."""
    return lambda world: (world / name).write_text(json.dumps(json.loads((world / name).read_text()) | fields))


def cut_off(name: str) -> Callable[[Path], object]:
    """Leave the first half of a file."""
    return lambda world: (world / name).write_bytes((world / name).read_bytes()[: (world / name).stat().st_size // 2])


def other_tokens(world: Path) -> None:
    tokenizer = json.loads((world / "teacher" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    (world / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))


def gone(name: str) -> Callable[[Path], object]:
    return lambda world: (world / name).unlink() if (world / name).is_file() else shutil.rmtree(world / name)


def nothing(world: Path) -> None:
    pass


CHAT = {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}]}
ROBOT = {"messages": [{"role": "robot", "content": "w5"}, {"role": "assistant", "content": "w7"}]}
PICKY = "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('who is robot?') }}{% endif %} {% endfor %}"
STRINGS = "stages.expert.trainer.assistant_only_loss=true"

# what is wrong -> (what to do to the world, overrides, how the sentence begins, what else it says)
BAD: dict[str, tuple[Callable[[Path], object], list[str], str, str]] = {
    "file that is not there": (gone("shop.jsonl"), [], "sources.shop.path", "does not exist"),
    "empty file": (put("shop.jsonl"), [], "sources.shop", "has no rows"),
    "broken JSON": (put("shop.jsonl", '{"prompt": '), [], "sources.shop", "line 1 is not JSON"),
    "wrong columns": (put("shop.jsonl", {"q": "w1", "a": "w2"}), [], "sources.shop", "line 1 needs"),
    "half a surrogate pair": (put("shop.jsonl", '{"text": "\\ud800"}'), [], "sources.shop", "no character"),
    "two forms in one source": (put("shop.jsonl", {"text": "w1"}, CHAT), [], "sources.shop", "holds rows of one form"),
    "holdout above the rows": (nothing, ["sources.shop.holdout=24"], "sources.shop.holdout", "leave none to train on"),
    "split of a file": (nothing, ["sources.shop.split=trian"], "sources.shop", "no split 'trian'"),
    "hub name that does not exist": (nothing, ["sources.shop.path=no/where"], "sources.shop", "could not be had from the hub"),
    "validation file that is broken": (
        put("v.jsonl", "[1]"),
        ["sources.shop.holdout=null", "sources.shop.validation=OUT/v.jsonl"],
        "sources.shop",
        "line 1 is a list",
    ),
    "role that the template refuses": (
        put("shop.jsonl", *[ROBOT] * 9),
        [f"tokenizer={{path: OUT/base, chat_template: {json.dumps(PICKY)}}}"],
        "sources.shop",
        "who is robot",
    ),
    "nobody to be the assistant": (nothing, [STRINGS], "sources.shop", "nobody is marked as the assistant"),
    "rows that are too long": (nothing, ["stages.expert.trainer.max_length=4"], "stages.expert.data", "more than max_length=4"),
    "mixture without a row": (
        nothing,
        ["stages.aligned.data={shop: 0.001, chat: 0.999}"],
        "stages.aligned.data.shop: ",
        "not one row",
    ),
    "mixture that the memory does not hold": (
        nothing,
        ["stages.aligned.data={sources: {shop: 1, chat: 1}, rows: 1000000000000}"],
        "stages.aligned.data.rows: 1,000,000,000,000 rows",
        "of memory are available; set fewer",
    ),
    "evaluation without rows": (
        nothing,
        ["sources.shop.holdout=null", "stages.expert.trainer.eval_strategy=epoch"],
        "stages.expert.data",
        "eval_strategy needs validation rows",
    ),
    "student that is not there": (
        nothing,
        ["stages.expert.student=no/where", "stages.aligned.student=no/where"],
        "tokenizer",
        "no/where",
    ),
    "teacher that is not there": (nothing, ["stages.cut.teacher=no/where"], "stages.cut.teacher", "no/where"),
    "teacher with another tokenizer": (other_tokens, [], "stages.cut.teacher", "its tokenizer is not the student's"),
    "teacher without weights": (gone("teacher/model.safetensors"), [], "stages.cut.teacher", "holds no weights"),
    "teacher cut off": (cut_off("teacher/model.safetensors"), [], "stages.cut.teacher", "not a whole safetensors file"),
    "teacher without config": (gone("teacher/config.json"), [], "stages.cut.teacher", "config"),
    "unknown model type": (
        nothing,
        ["stages.cut.student={config: {model_type: mistrall}}", "tokenizer=OUT/base"],
        "stages.cut.student",
        "mistrall",
    ),
    "field that the model has not": (
        nothing,
        ["stages.cut.student={config: {model_type: mistral, hidden_sice: 8}}", "tokenizer=OUT/base"],
        "stages.cut.student",
        "hidden_sice",
    ),
    "student larger than its teacher": (
        nothing,
        ["stages.cut.student.shape.num_hidden_layers=9"],
        "stages.cut.student",
        "num_hidden_layers=9",
    ),
    "calibration text that is too short": (
        nothing,
        ["stages.cut.student.calibration.tokens=100000"],
        "stages.cut.student",
        "too short",
    ),
    "calibration text that is too short for what is ranked": (
        nothing,
        ["stages.cut.student.calibration.tokens=50"],
        "stages.cut.student",
        "128 channels or neurons are ranked",
    ),
    "target modules that are not there": (
        nothing,
        ["stages.expert.lora.target_modules=[query]"],
        "stages.expert.lora",
        "query",
    ),
    "teacher that is the student": (
        nothing,
        ["stages.cut={type: kd, student: OUT/base, teacher: OUT/./base, data: [chat], trainer: {max_length: 64}}"],
        "stages.cut: teacher",
        "the student follows itself",
    ),
    "teachers that are the student's own base": (
        nothing,
        ["stages.aligned.teachers.shop.adapter=base", "stages.aligned.reference={adapter: base}"],
        "stages.aligned: teachers",
        "the student follows itself",
    ),
    "layers that are not there": (
        nothing,
        ["stages.cut.loss={attention_weight: 1, attention_layers: [[0, 9]]}"],
        "stages.cut.loss",
        "the student has 1 layers, the teacher 2",
    ),
    "heads of another number": (
        nothing,
        ["stages.cut.student.shape={num_attention_heads: 2, num_key_value_heads: 1}", "stages.cut.loss.attention_weight=1"],
        "stages.cut.loss",
        "attention heads, its teacher 4",
    ),
    "origin of a student that was not cut": (
        nothing,
        ["stages.cut.student=OUT/base", "stages.cut.loss={hidden_weight: 1, hidden_layers: origin}"],
        "stages.cut.loss",
        "was not made from a teacher",
    ),
    "origin of a student of another teacher": (
        nothing,
        [
            "stages.cut.teacher={config: {model_type: mistral, num_hidden_layers: 5, hidden_size: 32}}",
            "stages.cut.loss={hidden_weight: 1, hidden_layers: origin}",
            "tokenizer=OUT/base",
        ],
        "stages.cut.loss",
        "cut to 1 of its teacher's 2 layers, but has 1, and is compared with a teacher of 5",
    ),
    "options that do not go together": (
        nothing,
        ["stages.expert.trainer.logging_steps=0"],
        "stages.expert.trainer",
        "logging_steps",
    ),
    "tracker that nobody knows": (nothing, ["stages.expert.trainer.report_to=wandbb"], "stages.expert.trainer", "wandbb"),
    "tracker that is not installed": (nothing, ["stages.cut.trainer.report_to=comet_ml"], "stages.cut.trainer", "comet"),
    "optimizer that is not installed": (nothing, ["stages.cut.trainer.optim=galore_adamw"], "stages.cut.trainer", "galore"),
    "best by nothing": (
        nothing,
        ["stages.aligned.trainer.save_strategy=best", "stages.aligned.trainer.eval_strategy=epoch"],
        "stages.aligned",
        "save_strategy=best needs metric_for_best_model",
    ),
    "best by a metric that is not there": (
        nothing,
        [
            "stages.aligned.trainer.save_strategy=best",
            "stages.aligned.trainer.eval_strategy=epoch",
            "stages.aligned.trainer.metric_for_best_model=eval_ce/shopp",
        ],
        "stages.aligned",
        "did you mean 'ce/shop'?",
    ),
    "evaluation at the start without rows": (
        nothing,
        ["sources.shop.holdout=null", "stages.expert.trainer.eval_on_start=true"],
        "stages.expert.data",
        "eval_on_start needs validation rows",
    ),
    "padding_free without packing": (nothing, ["stages.aligned.trainer.padding_free=true"], "stages.aligned", "padding_free"),
    "checkpointing in unknown words": (
        nothing,
        [
            "stages.aligned.trainer.gradient_checkpointing=true",
            "stages.aligned.trainer.gradient_checkpointing_kwargs={reentrant: true}",
        ],
        "stages.aligned.trainer",
        "gradient_checkpointing_kwargs: torch says: ",
    ),
    "optimizer out of its range": (nothing, ["stages.cut.trainer.adam_beta1=2"], "stages.cut.trainer", "beta"),
    "compiler in unknown words": (
        nothing,
        ["stages.aligned.trainer.torch_compile=true", "stages.aligned.trainer.torch_compile_mode=fast"],
        "stages.aligned.trainer",
        "torch_compile: Unrecognized mode=fast",
    ),
    "forgetting by a metric that is not there": (
        nothing,
        [
            "stages.aligned.select={gain: shop, forgetting: {jsd/general: 0.1}}",
            "stages.aligned.trainer.eval_strategy=steps",
            "stages.aligned.trainer.eval_steps=1",
            "stages.aligned.trainer.save_steps=1",
        ],
        "stages.aligned",
        "select.forgetting.jsd/general: no evaluation",
    ),
    "a batch that finds its size": (
        nothing,
        ["stages.aligned.trainer={max_steps: 2, max_length: 64, auto_find_batch_size: true}"],
        "override",
        "halve the batch",
    ),
    "teacher on a GPU that is not there": (
        nothing,
        ["stages.cut.teacher={path: OUT/teacher, device_map: '7777'}"],
        "stages.cut.teacher",
        "name one that exists",
    ),
    "hub that does not know who pushes": (
        nothing,
        ["stages.aligned.trainer.push_to_hub=true"],
        "stages.aligned.trainer",
        "push_to_hub: the hub does not say",
    ),
    "scheduler without its settings": (
        nothing,
        ["stages.expert.trainer.lr_scheduler_type=cosine_with_min_lr"],
        "stages.expert.trainer",
        "min_lr",
    ),
    "output directory that is a file": (nothing, ["output_dir=OUT/shop.jsonl"], "output_dir", "is a file"),
    "output directory below a file": (nothing, ["output_dir=OUT/shop.jsonl/run"], "output_dir", "is a file"),
    "suite without its data": (
        lambda world: (
            (world / "pairs.jsonl").write_text("{}"),
            (world / "s.yaml").write_text(
                f"name: s\noutput_dir: x\nbenchmarks: {{p: {{type: minimal_pairs, path: {world}/pairs.jsonl}}}}"
            ),
        ),
        ["evaluation.suites=[OUT/s.yaml]"],
        "evaluation.suites",
        "sentence_good",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said_in_one_sentence_before_any_training(what: str, world: Path) -> None:
    spoil, overrides, key, says = BAD[what]
    spoil(world)
    before = sorted(world.rglob("*"))
    with pytest.raises(UserError) as error:
        prepare(recipe(world, *overrides))
    message = str(error.value)
    assert any(re.search(rf"(^|\s){re.escape(key)}", line) and says in line for line in message.splitlines()), message
    assert sorted(world.rglob("*")) == before


def test_a_student_that_follows_itself_and_something_else_is_trained(world: Path) -> None:
    own = "stages.cut={type: kd, student: OUT/base, teacher: OUT/base, data: [chat], trainer: {max_length: 64}}"
    for more in ("stages.cut.loss.ce_weight=0.5", "stages.cut.teacher={path: OUT/base, quantization: 4bit}"):
        prepare(recipe(world, own, more))
    rows = [json.loads(line) for line in (world / "general.jsonl").read_text().splitlines()]
    put("general.jsonl", *[row | {"teacher_prompt": "w1 w2 "} for row in rows])(world)
    prepare(recipe(world, own))


def test_an_sft_stage_does_not_look_at_a_teacher_prompt(world: Path) -> None:
    """What a kd stage cannot follow is no error of the sft stage that has the same rows."""
    rows = [json.loads(line) for line in (world / "shop.jsonl").read_text().splitlines()]
    merged = [row | {"teacher_prompt": "w1 w2"} for row in rows]  # without its space the response is another word
    put("shop.jsonl", *merged)(world)
    told = "stages.cut={type: kd, student: OUT/base, teacher: OUT/teacher, data: [shop], trainer: {max_length: 64}}"
    with pytest.raises(UserError, match="rows with a teacher_prompt cannot be followed") as error:
        prepare(recipe(world, told, "evaluation=null"))
    assert {each.key for each in error.value.details} == {"sources.shop"}
    both = recipe(world, told, "evaluation=null")
    assert TEACHER_PROMPT_IDS not in DataBuilder(both).for_stage("shop", both.stages["expert"])[0].column_names
    alone = "stages={expert: {type: sft, student: OUT/base, data: [shop], trainer: {max_length: 64}}}"
    assert "teacher" not in preview(prepare(recipe(world, alone, "evaluation=null")))


def test_all_that_is_wrong_is_said_at_once(world: Path) -> None:
    other_tokens(world)
    layers = "stages.aligned.loss={attention_weight: 1, attention_layers: [[0, 9]]}"
    with pytest.raises(UserError) as error:
        prepare(recipe(world, "stages.expert.trainer.max_length=4", "stages.aligned.lora.target_modules=[query]", layers))
    lines = str(error.value).splitlines()
    assert lines[0] == "deep: 4 errors" and len(error.value.details) == 4
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "stages.expert.data",
        "stages.aligned.loss",
        "stages.aligned.lora",
        "stages.cut.teacher",
    ]


def test_a_disk_that_is_too_small(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"output_dir: .*free some space"):
        prepare(recipe(world))


def test_a_cache_that_cannot_be_written_is_told_before_any_training(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "locked").mkdir()
    monkeypatch.setattr(disk.os, "access", lambda path, mode: Path(path) != world / "locked")
    cached = "stages.cut.teacher={path: OUT/teacher, cache: {keep: hidden, path: OUT/locked/here}}"
    with pytest.raises(UserError, match=r"stages.cut.teacher.cache.path: .*locked/here cannot be made: .*; choose another"):
        prepare(recipe(world, cached))
    (world / "locked" / "here").mkdir()
    (world / "locked" / "here" / "manifest.json").touch()
    prepare(recipe(world, cached))  # one that is there is only read


def test_what_is_prepared_is_what_is_trained(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = recipe(world, "evaluation=null")
    ready = prepare(small)
    assert not (world / "run").exists()
    run_recipe(small)
    done = json.loads((world / "run" / "stages" / "aligned" / "stage.json").read_text())
    counts = {domain: vars(count) for domain, count in ready.stages["aligned"].counts.items()}
    assert done["rows"]["train"] == counts
    cards = [card.read_text() for card in (world / "run").glob("stages/*/README.md")]
    assert cards and not any("[None]" in card for card in cards)
    said = capsys.readouterr().out
    lines = [line for line in preview(ready, 0).splitlines() if line.startswith("    shop")]
    assert len(lines) == 4 and all(line in said for line in lines)
    assert not prepare(small).stages and "nothing will be trained" in preview(prepare(small))


def test_a_cut_student_is_compared_with_the_layers_that_it_was_cut_from(world: Path) -> None:
    """Its only layer is the teacher's first: ``uniform`` would compare it with the last."""
    ends = {}
    for choice in ("origin", "[[0, 0]]", "uniform"):
        out = world / f"run-{len(ends)}"
        loss = f"stages.cut.loss={{attention_weight: 1, hidden_weight: 1, attention_layers: {choice}, hidden_layers: {choice}}}"
        cut = recipe(world, f"output_dir={out}", loss, "stages.cut.student.importance=first")
        run_recipe(cut.model_copy(update={"stages": {"cut": cut.stages["cut"]}, "evaluation": None}))
        ends[choice] = load_file(out / "stages/cut/model/model.safetensors")
        config = json.loads((out / "stages/cut/model/config.json").read_text())
        assert config["daekit_origin"] == {"layers": [0], "of": 2}, "what is trained on says so, too"
    assert all(torch.equal(ends["origin"][name], ends["[[0, 0]]"][name]) for name in ends["origin"])
    assert not all(torch.equal(ends["origin"][name], ends["uniform"][name]) for name in ends["origin"])


def test_sources_of_other_forms_are_mixed_each_as_it_is(world: Path) -> None:
    put("shop.jsonl", *[CHAT] * 9)(world)
    ready = prepare(recipe(world, "stages.cut.data=[chat, shop]"))
    rows = ready.stages["cut"].mixture.dataset
    tokenizer = tiny.tokenizer()
    shop = {tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in rows if row["domain"] == "shop"}
    assert shop == {"w7 </s>"} and "general" in rows["domain"]
    assert any("sources.chat.chat: true" in note for note in ready.notes)


def test_preview_marks_exactly_what_carries_loss(world: Path) -> None:
    put("shop.jsonl", *[CHAT] * 9)(world)
    text = preview(prepare(recipe(world)), 1, colour=False)
    assert "w0 w5 w1{+ w7 </s>+}" in text
    assert "\x1b[32m" in preview(prepare(recipe(world)), 1, colour=True)
    whole = preview(prepare(recipe(world, "stages.expert.trainer.assistant_only_loss=false")), 1, colour=False)
    assert "w0{+ w5 w1 w7 </s>+}" in whole and "every token, the user's" in whole


def test_preview_does_not_let_rows_steer_the_terminal(world: Path) -> None:
    put("shop.jsonl", *[{"messages": [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "w7"}]}] * 9)(
        world
    )
    tokenizer = json.loads((world / "base" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\x1b[2J"] = len(tokenizer["model"]["vocab"])
    (world / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(world / "base" / "tokenizer.json", world / "teacher" / "tokenizer.json")
    assert "\x1b" not in preview(prepare(recipe(world)), 1, colour=False)


def test_check_deep_and_preview_on_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "deep.yaml").write_text(RECIPE.replace("OUT", str(world)))
    assert main(["check", "--deep", str(world / "deep.yaml")]) == 0
    assert "everything that the run needs is there" in capsys.readouterr().out
    assert main(["preview", str(world / "deep.yaml"), "3", "sources.shop.limit=5"]) == 0
    out = capsys.readouterr().out
    assert "--- row 3 of shop" in out and "--- row 4 of shop" not in out and "5 training rows" in out
    assert main(["check", "--deep", str(world / "deep.yaml"), "stages.expert.trainer.max_length=4"]) == 2


def test_no_weights_are_loaded(world: Path) -> None:
    weights = {
        name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(world / "teacher/model.safetensors").items()
    }
    save_file(weights, world / "teacher/model.safetensors", {"format": "pt"})
    assert prepare(recipe(world)).stages.keys() == {"expert", "aligned", "cut"}


def test_the_report_of_a_stage_whose_student_was_made_from_its_teacher(world: Path) -> None:
    """A dae stage without a reference follows the student as it stood: the one that was made, not the recipe for it."""
    student = "{from: OUT/base, shape: {num_hidden_layers: 1}, calibration: {tokens: 140, sources: [chat]}}"
    overrides = [f"stages.aligned.student={student}", "stages.aligned.lora=null", "stages.aligned.teachers={shop: OUT/teacher}"]
    run_recipe(recipe(world, *overrides, "stages.expert.trainer.max_steps=1", "stages.cut.trainer.max_steps=1"))
    rows = json.loads((world / "run" / "report" / "report.json").read_text())
    assert {row["domain"] for row in rows if (row["model"], row["metric"]) == ("aligned", "kl_to_teacher")} == {
        "general",
        "shop",
    }


def test_the_report_says_how_far_each_model_went_from_the_student_as_it_was(world: Path) -> None:
    run_recipe(recipe(world, "stages.aligned.trainer.learning_rate=0.01", "stages.expert.trainer.learning_rate=0.01"))
    rows = json.loads((world / "run" / "report" / "report.json").read_text())
    distance = {(row["model"], row["domain"]): row["value"] for row in rows if row["metric"] == "kl_to_reference"}
    models, domains = ("student-as-it-was", "expert", "aligned", "cut"), ("general", "shop")
    assert distance.keys() == {(model, domain) for model in models for domain in domains}
    for domain in domains:
        assert distance["student-as-it-was", domain] == pytest.approx(0, abs=1e-6)
        assert distance["aligned", domain] > 1e-4
    followed = {row["domain"]: row["value"] for row in rows if (row["model"], row["metric"]) == ("aligned", "kl_to_teacher")}
    assert followed["general"] == pytest.approx(distance["aligned", "general"])
    assert followed["shop"] != distance["aligned", "shop"]
    text = (world / "run" / "report" / "report.md").read_text()
    assert "KL to reference" in text.split("## Notes")[0] and "cannot show forgetting" in text


def test_the_report_scores_the_tokens_that_the_stages_train_on(world: Path) -> None:
    put("shop.jsonl", *[CHAT] * 9)(world)
    whole = [f"stages.{name}.trainer.assistant_only_loss=false" for name in ("expert", "aligned", "cut")]
    for overrides, scored in (([], "w7 </s>"), (whole, "w0 w5 w1 w7 </s>")):
        row = prepare(recipe(world, *overrides)).models.data.evaluation_sets["shop"].rows[0]
        assert tiny.tokenizer().decode([label for label in row.labels if label >= 0]) == scored


# ---- what several stages and the report need of each other -------------------------------------------------------------


def test_a_lost_result_is_made_again_although_a_later_stage_is_open(world: Path) -> None:
    run_recipe(recipe(world))
    stages = world / "run" / "stages"
    shutil.rmtree(stages / "expert" / "model")
    (stages / "aligned" / "stage.json").unlink()
    assert {"expert", "aligned"} <= set(prepare(recipe(world)).stages)
    run_recipe(recipe(world))
    assert (stages / "expert" / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("step", [1, 777])
def test_a_checkpoint_that_a_stage_will_not_have_is_told_before_it_trains(step: int, world: Path) -> None:
    student = f"stages.cut.student=stage:aligned@checkpoint-{step}"
    with pytest.raises(UserError, match=rf"stages.cut.student.*no checkpoint-{step}.* checkpoint-2"):
        prepare(recipe(world, student))
    with pytest.raises(UserError, match=rf"evaluation.models.other.*no checkpoint-{step}"):
        prepare(recipe(world, f"evaluation.models=[{{name: other, stage: aligned, checkpoint: {step}}}]"))
    prepare(recipe(world, "stages.cut.student=stage:aligned@checkpoint-2"))


@pytest.mark.parametrize(
    ("trainer", "rows", "kept"),
    [
        ("save_strategy: epoch, num_train_epochs: 2", 10, [3, 6]),
        ("save_strategy: epoch, max_steps: 7", 10, [3, 6, 7]),
        ("save_strategy: epoch, num_train_epochs: 3, save_total_limit: 2", 10, [6, 9]),
        ("save_steps: 2, num_train_epochs: 2", 10, [2, 4, 6]),
        ("save_steps: 2, max_steps: 5, gradient_accumulation_steps: 2", 10, [2, 4, 5]),
        ("save_strategy: epoch, max_steps: 4, gradient_accumulation_steps: 2", 10, [2, 4]),
        ("save_strategy: epoch, max_steps: 4, dataloader_drop_last: true", 10, [2, 4]),
        ("save_strategy: epoch, packing: true", 10, None),
        ("save_steps: 2, packing: true", 10, None),
        ("save_strategy: best, metric_for_best_model: eval_loss, eval_strategy: epoch", 10, None),
    ],
)
def test_the_checkpoints_that_a_stage_ends_with(trainer: str, rows: int, kept: list[int] | None, world: Path) -> None:
    text = f"stages.expert.trainer={{per_device_train_batch_size: 4, max_length: 64, {trainer}}}"
    arguments = training_arguments(recipe(world, text), "expert", RunFolder(world / "run").stage("expert"))
    assert checkpoints_at_end(arguments, rows) == kept


def test_a_checkpoint_after_epochs_is_counted_on_the_rows_that_are_left(world: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": "w3"}] * 12 + [{"prompt": "w1 " * 80, "completion": "w3"}] * 12
    put("shop.jsonl", *rows)(world)
    late = ["stages.expert.overlong=drop", "stages.expert.lora=null", "sources.shop.holdout=null", "evaluation=null"]
    late += [
        "stages.expert.trainer={save_strategy: epoch, num_train_epochs: 1, per_device_train_batch_size: 4, max_length: 64}"
    ]
    late += ["stages.aligned.overlong=drop", "stages.aligned.teachers.shop=stage:expert@checkpoint-3"]
    prepare(recipe(world, *late))
    with pytest.raises(UserError, match=r"stages.aligned.teachers.shop: .*no checkpoint-6: .* it ends with checkpoint-3"):
        prepare(recipe(world, *late, "stages.aligned.teachers.shop=stage:expert@checkpoint-6"))


def test_a_model_of_the_report_is_looked_at_before_the_training(world: Path) -> None:
    other_tokens(world)
    overrides = ["stages.cut.teacher=OUT/base", "evaluation.models=[expert, {other: OUT/teacher}]"]
    with pytest.raises(UserError, match=r"evaluation\.models\.other: .*tokenizer is not the student's"):
        prepare(recipe(world, *overrides))


def test_a_report_is_not_kept_when_its_rows_have_changed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["sources.chat.holdout=null", "sources.chat.validation=OUT/v.jsonl"]
    shutil.copy(world / "general.jsonl", world / "v.jsonl")
    for rows, kept in (("general", False), ("general", True), ("shop", False)):
        shutil.copy(world / f"{rows}.jsonl", world / "v.jsonl")
        run_recipe(recipe(world, *overrides))
        assert ("[report] complete, kept" in capsys.readouterr().out) == kept


def test_several_processes_do_not_begin_before_a_student_is_made(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"stages.cut.student: .*run `daekit init RECIPE` first"):
        require_one_process(ModelBuilder(DataBuilder(recipe(world))), "cut")


def test_an_evaluation_at_the_start_has_the_validation_rows(world: Path) -> None:
    run_recipe(recipe(world, "stages.expert.trainer.eval_on_start=true"))
    done = json.loads((world / "run" / "stages" / "expert" / "stage.json").read_text())
    assert done["log_history"][0]["step"] == 0 and "eval_ce/shop" in done["log_history"][0]


def test_an_engine_in_one_process_is_noted(world: Path) -> None:
    pytest.importorskip("deepspeed")
    ready = prepare(recipe(world, "stages.cut.trainer.deepspeed={zero_optimization: {stage: 2}}"))
    assert any("stages.cut: trainer.deepspeed splits the training over processes" in note for note in ready.notes)


def test_checkpointing_knows_what_torch_takes_beside_its_signature(world: Path) -> None:
    kwargs = "stages.cut.trainer.gradient_checkpointing_kwargs={use_reentrant: false, preserve_rng_state: false}"
    prepare(recipe(world, "stages.cut.trainer.gradient_checkpointing=true", kwargs))


def test_a_dae_student_that_is_its_own_reference_is_compared_with_itself(world: Path) -> None:
    student = "stages.aligned.student={from: OUT/base, shape: {num_hidden_layers: 1}, calibration: {tokens: 140}}"
    loss = "stages.aligned.loss={attention_weight: 1, attention_layers: %s}"
    more = ["stages.aligned.lora=null", "stages.aligned.teachers.shop=OUT/teacher", student]
    prepare(recipe(world, *more, loss % "origin"))
    with pytest.raises(UserError, match=r"stages.aligned.loss: .*the student has 1 layers, the teacher 1"):
        prepare(recipe(world, *more, loss % "[[0, 1]]"))


# ---- models that know so many positions and no more --------------------------------------------------------------------


def learned(world: Path, positions: int) -> None:
    """A GPT-2 in place of the teacher."""
    config = GPT2Config(vocab_size=48, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)
    shutil.rmtree(world / "teacher")
    AutoModelForCausalLM.from_config(config).save_pretrained(world / "teacher")
    tiny.tokenizer().save_pretrained(world / "teacher")


AFTER = "trainer: {max_steps: 1, max_length: 64}"
ALONE = f"stages={{kd: {{type: kd, student: OUT/base, teacher: OUT/teacher, data: [chat], {AFTER}}}}}"
OF_GPT2 = f"stages={{one: {{type: sft, student: OUT/teacher, data: [chat], {AFTER}}}}}"
OF_ANOTHER = f"stages={{one: {{type: sft, student: OUT/base, data: [chat], {AFTER}}}}}"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([ALONE], "stages.kd"),
        ([OF_GPT2], "stages.one"),
        ([OF_ANOTHER, "evaluation.models=[{gpt: OUT/teacher}]"], "evaluation"),
    ],
)
def test_rows_beyond_learned_positions_are_told_before_the_first_stage(overrides: list[str], key: str, world: Path) -> None:
    learned(world, 64)
    prepare(recipe(world, *overrides, "evaluation.generate=false"))
    learned(world, 5)
    with pytest.raises(UserError, match=r"gpt2 model has learned 5 positions, and is to read \d+ tokens; ") as error:
        prepare(recipe(world, *overrides, "evaluation.generate=false"))
    assert key in {detail.key for detail in error.value.details}


def test_what_a_teacher_is_told_beside_a_prompt_counts_among_its_positions(world: Path) -> None:
    put("general.jsonl", *[{"prompt": "w5 ", "completion": "w7", "teacher_prompt": "w5 w6 w8 w9 "}] * 24)(world)
    alone = [ALONE, "evaluation=null"]
    learned(world, 7)
    prepare(recipe(world, *alone))
    learned(world, 5)
    with pytest.raises(UserError, match=r"stages.kd: teacher: a gpt2 model has learned 5 positions, and is to read [67] "):
        prepare(recipe(world, *alone))


def test_rows_that_are_dropped_need_no_positions(world: Path) -> None:
    put("general.jsonl", *[{"prompt": "w5 ", "completion": "w7"}] * 24, {"prompt": "w5 ", "completion": "w7 " * 9})(world)
    learned(world, 8)
    stage = ALONE.replace("max_length: 64", "max_length: 12")
    prepare(recipe(world, stage.replace("data: [chat]", "data: [chat], overlong: drop").replace("12", "9"), "evaluation=null"))
    with pytest.raises(UserError, match="learned 8 positions, and is to read 9 tokens"):
        short = stage.replace("data: [chat]", "data: [chat], overlong: truncate").replace("12", "9")
        prepare(recipe(world, short, "evaluation=null"))


def test_answers_beyond_learned_positions_are_told_before_the_first_stage(world: Path) -> None:
    put("general.jsonl", *[{"prompt": "w5 w6 ", "completion": "w7"}] * 24)(world)
    learned(world, 20)
    prepare(recipe(world, OF_GPT2, "evaluation.max_new_tokens=15"))
    with pytest.raises(UserError, match=r"learned 20 positions, .* 21 tokens; lower max_new_tokens=16, or set generate: false"):
        prepare(recipe(world, OF_GPT2, "evaluation.max_new_tokens=16"))


def test_positions_of_models_whose_code_would_have_to_run_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether code may run"))
    config = GPT2Config(n_positions=8)
    assert learned_positions(config) == 8
    config.auto_map = {"AutoModelForCausalLM": "them/theirs--modeling.Theirs"}
    config.model_type = "theirs"
    assert learned_positions(config) == 8, "its own class is in transformers"


def test_a_block_of_packed_rows_is_no_longer_than_max_length(world: Path) -> None:
    put("general.jsonl", *[{"text": "w5 " * 40}] * 24)(world)
    learned(world, 16)
    packed = "stages.one.trainer={max_steps: 1, max_length: 16, packing: true, packing_strategy: wrapped, eval_strategy: no}"
    prepare(recipe(world, OF_GPT2, "evaluation=null", packed))
    with pytest.raises(UserError, match="learned 16 positions, and is to read 17 tokens"):
        prepare(recipe(world, OF_GPT2, "evaluation=null", packed.replace("max_length: 16", "max_length: 17")))


def test_a_validation_row_may_be_longer_than_every_training_row(world: Path) -> None:
    put("general.jsonl", *[{"text": "w5 w6 w7"}] * 24)(world)
    put("v.jsonl", {"text": "w5 " * 40})(world)
    learned(world, 16)
    watched = ["sources.chat={domain: general, path: OUT/general.jsonl, validation: OUT/v.jsonl}", "evaluation=null"]
    prepare(recipe(world, OF_GPT2, *watched))
    with pytest.raises(UserError, match=r"learned 16 positions, and is to read 4\d tokens"):
        prepare(recipe(world, OF_GPT2, *watched, "stages.one.trainer.eval_strategy=epoch"))
