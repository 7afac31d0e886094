"""Recipes whose models are adapters of one base: how they are written, resolved and dumped, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from daekit.cli import main
from daekit.errors import UserError
from daekit.recipe import Recipe, load_recipe_text, sharing_notes, stage_key, to_yaml
from daekit.recipe.load import resolve
from daekit.recipe.schema import ModelSpec
from tests.helpers.recipes import errors

TEXT = """
name: shared
output_dir: out
sources:
  general: {domain: general, path: "builtin:chat"}
  shop: {domain: shop, path: "builtin:shop"}
stages:
  expert:
    type: sft
    student: &base {path: base/model, quantization: 4bit, dtype: bfloat16, revision: v1}
    lora: {r: 8}
    data: [shop]
  kd: {type: kd, student: *base, lora: {r: 4}, teacher: big/model, data: [general]}
  dae:
    type: dae
    student: {adapter: stage:kd}
    teachers: {shop: {adapter: stage:expert}}
    reference: {adapter: base}
    data: {shop: 0.5, general: 0.5}
"""


def load(*overrides: str, text: str = TEXT) -> Recipe:
    return load_recipe_text(text, "shared.yaml", overrides)


def adapter(folder: Path, **changes: Any) -> Path:
    """An adapter's config, which is all that a recipe reads."""
    folder.mkdir()
    config = dict(peft_type="LORA", base_model_name_or_path="base/model", revision="v1", target_modules=["q_proj"]) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_in_a_recipe() -> None:
    recipe = load()
    dae = recipe.stages["dae"]
    base = ModelSpec(path="base/model", quantization="4bit", dtype="bfloat16", revision="v1", adapter="stage:kd")
    assert dae.student == base  # the base of the stage whose adapter it continues, as it was loaded there
    assert dae.teachers["shop"].model == ModelSpec(adapter="stage:expert")
    assert dae.reference is not None and dae.reference.model == ModelSpec(adapter="base")
    assert resolve(recipe) == recipe == load_recipe_text(to_yaml(recipe), "again")
    assert sharing_notes(recipe) == []
    other = load("stages.dae.student={adapter: stage:kd, attn_implementation: eager, dtype: float32}").stages["dae"].student
    assert other is not None and (other.path, other.attn_implementation, other.dtype) == ("base/model", "eager", "float32")


def test_an_ensemble_and_a_kd_teacher_of_adapters() -> None:
    members = "{ensemble: [{model: {adapter: stage:expert}, weight: 0.5}, {model: {adapter: base}, weight: 0.5}]}"
    assert load(f"stages.dae.teachers.shop={members}").stages["dae"].teachers["shop"].ensemble[1].model.adapter == "base"
    kd = load("stages.kd.teacher={adapter: stage:expert}").stages["kd"].teacher
    assert kd is not None and kd.model == ModelSpec(adapter="stage:expert")


def test_an_adapter_from_a_directory(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "expert")
    recipe = load(
        f"stages.dae.teachers.shop.adapter={folder}", f"stages.kd.student={{adapter: {folder}}}", "stages.kd.lora=null"
    )
    assert recipe.stages["kd"].student == ModelSpec(adapter=str(folder))
    assert recipe.stages["dae"].student == ModelSpec(adapter="stage:kd")  # of a base that the adapter itself names
    assert load_recipe_text(to_yaml(recipe), "again") == recipe


def test_the_result_of_a_stage_depends_on_the_stages_of_its_adapters() -> None:
    assert stage_key(load(), "dae")["stages"].keys() == {"expert", "kd"}
    assert stage_key(load(), "dae") != stage_key(load("stages.expert.lora.r=2"), "dae")
    assert stage_key(load("stages.dae.reference=null"), "dae") != stage_key(load(), "dae")


FULL = "stages.kd.lora=null", "stages.kd.student.quantization=null"
PROVOKED = [
    (
        ["stages.dae.teachers.shop.adapter=stage:expret"],
        "there is no stage 'expret' (earlier ones: expert and kd); did you mean",
    ),
    (["stages.dae.teachers.shop.adapter=stage:dae"], "refers to its own result"),
    (["stages.expert.student.adapter=stage:dae", "stages.expert.lora=null"], "the stage 'dae' runs after 'expert'"),
    (
        [
            *FULL,
            "stages.dae.student={path: base/model, revision: v1}",
            "stages.dae.lora={}",
            "stages.dae.reference.adapter=stage:kd",
        ],
        "stages.dae.reference.adapter: the stage 'kd' trains no LoRA adapter; name its result itself",
    ),
    (
        ["stages.expert.student.path=other/model"],
        "trains an adapter of 'other/model' (revision v1), not of this student's base",
    ),
    (
        [
            "stages.expert={type: sft, student: a/model, data: [shop]}",
            "stages.kd={type: sft, student: stage:expert, lora: {}, data: [shop]}",
            "stages.dae={student: {path: a/model}, lora: {}, teachers: {shop: {adapter: stage:kd}}, "
            "type: dae, reference: null, data: [shop, general]}",
        ],
        "stages.dae.teachers.shop.adapter: the stage 'kd' trains an adapter of 'stage:expert', not of this student's base "
        "'a/model'; give both stages the same base",
    ),
    (
        ["stages.expert.student.revision=v2"],
        "'base/model' (revision v2), not of this student's base 'base/model' (revision v1)",
    ),
    (
        ["stages.dae.student={path: base/model, revision: v1}", "stages.dae.reference=null"],
        "but the student is trained whole; add `lora`",
    ),
    (["stages.dae.lora={}"], "stages.dae.lora: the student goes on with an adapter that has its own rank"),
    (["stages.dae.student.adapter=base"], "a student cannot train the bare base's adapter"),
    (["stages.dae.student.revision=v3"], "stages.dae.student.revision: is a revision of which base?"),
    (
        ["stages.dae.teachers.shop.quantization=4bit"],
        "an adapter runs on the student's base, as it is loaded there; remove quantization",
    ),
    (["stages.dae.teachers.shop.path=a"], "stages.dae.teachers.shop.path: an adapter runs on the student's base"),
    (["stages.dae.reference.adapter=nowhere"], "nowhere: is no directory with a LoRA adapter"),
]


@pytest.mark.parametrize(("overrides", "message"), PROVOKED, ids=[" ".join(o) for o, _ in PROVOKED])
def test_what_is_wrong_with_an_adapter(overrides: list[str], message: str) -> None:
    (error,) = errors(TEXT, *overrides)
    assert message in error


CONFIGS: list[tuple[dict[str, Any], str]] = [
    (dict(base_model_name_or_path="other/model"), "is an adapter of 'other/model', not of the student's base 'base/model'"),
    (dict(revision="v2"), "is an adapter of revision 'v2'"),
    (dict(peft_type="LOHA"), "of the kind LOHA"),
    (dict(base_model_name_or_path=None), "names no base model"),
    (dict(target_modules=["lm_head"]), "LoRA matrices on lm_head"),
    (dict(init_lora_weights="olora"), "'olora' has changed the weights of the base"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_an_adapter_config_is_read_with_the_recipe(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "expert", **changes)
    with pytest.raises(UserError, match=f"stages.dae.teachers.shop.adapter: .*{message}"):
        load(
            f"stages.dae.teachers.shop.adapter={folder}",
            "stages.dae.student={path: base/model, revision: v1}",
            "stages.dae.lora={}",
        )


CHAIN = """
name: chain
output_dir: OUT
models: {m: b/model}
sources:
  general: {domain: general, path: "builtin:chat"}
  shop: {domain: shop, path: "builtin:shop"}
stages:
  first: {type: sft, student: a/model, data: [shop]}
  expert: {type: sft, student: "stage:first", lora: {}, data: [shop]}
  more: {type: sft, student: {adapter: "stage:expert"}, data: [shop]}
  dae: {type: dae, student: "stage:first", lora: {}, teachers: {shop: {adapter: "stage:more"}}, data: [shop, general]}
"""


@pytest.mark.parametrize(
    ("base", "student"),
    [
        ("stage:first", "stage:first"),
        ("stage:first", "OUT/stages/first/model"),
        ("stage:first", "{adapter: stage:expert}"),
        ("a/model", "a/model"),
        ("model:m", "model:m"),
        ("model:m", "b/model"),
    ],
)
def test_an_adapter_of_a_chain_of_stages_whose_base_is_the_student_s(base: str, student: str, tmp_path: Path) -> None:
    (tmp_path / "stages/first/model").mkdir(parents=True)
    overrides = [f"stages.expert.student={base}", f"stages.dae.student={student}".replace("OUT", str(tmp_path))]
    load(*overrides, *(["stages.dae.lora=null"] if "adapter" in student else []), text=CHAIN.replace("OUT", str(tmp_path)))


NOTES = [
    (
        ["stages.dae.teachers.shop=stage:expert"],
        "stages.dae.teachers.shop: stage 'expert' is a LoRA adapter of this student's base",
    ),
    (["stages.expert.student.quantization=8bit"], "trained on a base in 8bit and runs on one in 4bit"),
]


@pytest.mark.parametrize(("overrides", "message"), NOTES)
def test_notes_on_a_base_that_is_loaded_twice(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(*overrides)
    (note,) = sharing_notes(recipe)
    assert message in note
    (tmp_path / "recipe.yaml").write_text(TEXT)
    assert main(["check", str(tmp_path / "recipe.yaml"), *overrides]) == 0
    printed = capsys.readouterr().out
    assert f"# note: {note}" in printed and load_recipe_text(printed, "printed") == recipe


def test_no_notes_where_nothing_is_shared() -> None:
    assert sharing_notes(load("stages.dae.teachers.shop=stage:expert", "stages.expert.student.path=other/model")) == []
    assert sharing_notes(load("stages.dae.teachers.shop=a/model")) == []
