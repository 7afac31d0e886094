"""A recipe with caches: made first, shared, complete after a run; its stages end in the weights of the live run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from daekit.errors import UserError
from daekit.planning.plan import plan_recipe
from daekit.recipe import load_recipe_text, stage_key, to_yaml
from daekit.recipe.schema import Recipe
from daekit.runtime.run import cache_teachers, run_recipe
from daekit.teachers import CachedTeacher, ModelTeacher
from tests.helpers.cache_world import build_world, recipe_text
from tests.helpers.planning import CPU


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def recipe(world: Path, out: Path, *overrides: str, live: bool = False) -> Recipe:
    return load_recipe_text(recipe_text(world, out, live), "cached.yaml", overrides)


def models_loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the frozen models that are made from here on."""
    made: list[str] = []
    init = ModelTeacher.__init__

    def counting(self: ModelTeacher, model: Any, vocab_size: int, name: str = "teacher", **how: Any) -> None:
        made.append(Path(name).name)
        init(self, model, vocab_size, name, **how)

    monkeypatch.setattr(ModelTeacher, "__init__", counting)
    return made


def test_a_run_with_caches_is_the_live_run_to_the_bit_and_loads_each_teacher_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(recipe(world, tmp_path / "live", live=True))
    capsys.readouterr()
    made = models_loaded(monkeypatch)
    run_recipe(recipe(world, tmp_path / "cached"))
    assert made == ["base", "expert", "reference"]
    said = capsys.readouterr().out
    assert said.count("every frozen model is read from its cache: none is loaded") == 2
    for stage in ("kd", "dae"):
        live, cached = (
            load_file(tmp_path / run / "stages" / stage / "model" / "model.safetensors") for run in ("live", "cached")
        )
        assert live.keys() == cached.keys() and all(live[key].equal(cached[key]) for key in live)
    folders = list((tmp_path / "cached" / "caches").iterdir())
    assert len(folders) == 3
    assert sum(len(CachedTeacher(folder).store.index) for folder in folders) == 12 + (9 + 4) + 12


def test_daekit_cache_makes_what_can_be_made_and_training_uses_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_teachers(recipe(world, tmp_path))
    said = capsys.readouterr().out
    assert "[dae] needs the stage 'kd', which is not complete" in said and "[kd] cache: " in said
    made = models_loaded(monkeypatch)
    run_recipe(recipe(world, tmp_path))
    assert made == ["expert", "reference"]
    assert "[kd] cache complete, kept" in capsys.readouterr().out


def test_daekit_cache_check_says_what_differs(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teachers(recipe(world, tmp_path), check=True)
    assert ": hidden.0: all " in (said := capsys.readouterr().out) and "are equal to the bit (12 rows)" in said


def test_equal_teachers_share_a_directory_and_a_path_is_shared_between_recipes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = f"stages.kd.teacher={{path: {world}/base, cache: {{keep: hidden, path: {tmp_path}/shared}}}}"
    made = models_loaded(monkeypatch)
    for out in ("one", "two"):
        cache_teachers(recipe(world, tmp_path / out, shared))
    assert made == ["base"]
    again = f"stages.dae.teachers.shop={{path: {world}/base, cache: hidden}}"
    run_recipe(recipe(world, tmp_path / "three", again))
    assert len(list((tmp_path / "three" / "caches").iterdir())) == 2  # base for general and shop rows, and the reference


@pytest.mark.parametrize("measured", ["kd", "dae"])
def test_the_report_loads_what_it_measures_and_says_so(
    measured: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """KL to a teacher on rows that its cache does not hold; a teacher whose domain has no such rows is not loaded."""
    reference = f"stages.dae.reference={{path: {world}/base, cache: hidden}}"
    loaded_for = {
        "kd": ["stages.kd.teacher", "stages.dae.reference"],
        "dae": ["stages.dae.teachers.shop", "stages.dae.reference"],
    }
    made = models_loaded(monkeypatch)
    whole = recipe(world, tmp_path, reference, f"evaluation={{models: [{measured}], generate: false}}")
    run_recipe(whole)
    out = capsys.readouterr().out
    said = [line.split()[1].rstrip(":") for line in out.splitlines() if "loaded to measure KL" in line]
    assert sorted(said) == sorted(loaded_for[measured])
    written, report = ["base", "expert"], {"kd": ["base", "base"], "dae": ["expert", "base"]}
    assert made[len(written) :] == report[measured] and sorted(made[: len(written)]) == sorted(written)
    planned = {
        f"stages.{s.name}.{cache.teacher}" for s in plan_recipe(whole, CPU).stages for cache in s.caches if cache.reported
    }
    assert planned == set(loaded_for[measured])
    nothing = recipe(world, tmp_path, reference)
    assert not any(cache.reported for s in plan_recipe(nothing, CPU).stages for cache in s.caches)


@pytest.mark.parametrize("other", ["path: WORLD/expert", "path: WORLD/base, dtype: bfloat16"])
def test_a_path_that_holds_another_teachers_cache_is_refused_before_anything_is_loaded(
    other: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = f"cache: {{keep: hidden, path: {tmp_path}/shared}}"
    cache_teachers(recipe(world, tmp_path / "one", f"stages.kd.teacher={{path: {world}/base, {kept}}}"))
    made = models_loaded(monkeypatch)
    theirs = other.replace("WORLD", str(world))
    with pytest.raises(UserError, match=r"is the cache of something else .*source: "):
        cache_teachers(recipe(world, tmp_path / "two", f"stages.kd.teacher={{{theirs}, {kept}}}"))
    assert made == []


def test_an_adapters_cache_is_not_taken_for_one_on_another_base(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    teacher = f"stages.kd.teacher={{path: {tmp_path}/adapter, cache: {{keep: hidden, path: {tmp_path}/shared}}}}"
    cache_teachers(recipe(world, tmp_path / "one", teacher))
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is the cache of something else .*source: "):
        cache_teachers(recipe(world, tmp_path / "two", teacher))


def test_top_k_sampled_and_labels_in_a_recipe(world: Path, tmp_path: Path) -> None:
    overrides = [
        "stages.kd.teacher.cache={keep: top_k, k: 8}",
        "stages.dae.teachers.shop=labels",
        "stages.dae.reference.cache={keep: sampled, draws: 9}",
    ]
    run_recipe(recipe(world, tmp_path, *overrides))
    kept = sorted(json.loads(path.read_text())["keep"] for path in tmp_path.glob("caches/*/facts.json"))
    assert kept == ["sampled", "top_k"]
    facts = json.loads(next(tmp_path.glob("stages/dae/stage.json")).read_text())
    assert facts["run"]["teacher"]["shop"] == {"kind": "labels"}


def test_an_adapter_and_the_bare_base_are_cached_on_the_base(world: Path, tmp_path: Path) -> None:
    expert = {"type": "sft", "student": str(world / "student"), "lora": {"r": 2}, "data": ["shop"]}
    tree = yaml.safe_load(to_yaml(recipe(world, tmp_path)))
    tree["stages"] = {
        "expert": expert | {"trainer": tree["stages"]["kd"]["trainer"]},
        "dae": tree["stages"]["dae"]
        | {
            "student": str(world / "student"),
            "lora": {"r": 2},
            "teachers": {"shop": {"adapter": "stage:expert", "cache": {"keep": "hidden"}}},
            "reference": {"adapter": "base", "cache": {"keep": "hidden"}},
        },
    }
    run_recipe(load_recipe_text(yaml.safe_dump(tree, sort_keys=False), "lora.yaml"))
    sources = [json.loads(path.read_text())["source"]["models"][0] for path in tmp_path.glob("caches/*/facts.json")]
    assert len(sources) == 2 and sources[0]["base"] == sources[1]["base"] and sources[0]["adapter"] != sources[1]["adapter"]


def test_where_a_cache_lies_is_no_part_of_what_a_stage_depends_on(world: Path, tmp_path: Path) -> None:
    one = recipe(world, tmp_path, "stages.kd.teacher.cache={keep: hidden, path: a}")
    two = recipe(world, tmp_path, "stages.kd.teacher.cache={keep: hidden, path: b}")
    three = recipe(world, tmp_path, "stages.kd.teacher.cache={keep: sampled}")
    assert stage_key(one, "kd") == stage_key(two, "kd") != stage_key(three, "kd")


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("stages.kd.teacher.cache.k", ["stages.kd.teacher.cache={keep: hidden, k: 8}"]),
        ("stages.kd.teacher.cache.draws", ["stages.kd.teacher.cache={keep: top_k, draws: 8}"]),
        ("stages.kd.teacher.cache.draws", ["stages.kd.teacher.cache={keep: sampled, draws: 300}"]),
        ("stages.kd.teacher.cache", ["stages.kd.teacher.cache=logits"]),
        ("stages.kd.loss.attention_weight", ["stages.kd.loss.attention_weight=1"]),
        ("stages.kd.loss.hidden_weight", ["stages.kd.loss.hidden_weight=1"]),
        ("stages.kd.loss.divergence", ["stages.kd.teacher.cache=sampled", "stages.kd.loss.divergence=jsd"]),
        ("stages.kd.loss.temperature", ["stages.kd.teacher.cache=sampled", "stages.kd.loss.temperature=2"]),
        ("stages.dae.loss.temperature", ["stages.dae.teachers.shop=labels", "stages.dae.loss.temperature=2"]),
        ("stages.dae.teachers.shop.cache", ["stages.dae.teachers.shop={labels: true, cache: hidden}"]),
        ("stages.kd.teacher", ["stages.kd.teacher={cache: hidden}"]),
    ],
)
def test_what_a_recipe_may_not_say(key: str, overrides: list[str], world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        recipe(world, tmp_path, *overrides)
    assert key in {detail.key for detail in caught.value.details}


def test_a_resolved_recipe_loads_again_to_the_same(world: Path, tmp_path: Path) -> None:
    whole = recipe(world, tmp_path, "stages.dae.teachers.shop=labels")
    assert load_recipe_text(to_yaml(whole), "again.yaml") == whole
