"""Recipes and suites that nobody meant to write: each is one clear error, found before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daekit.cli import main
from daekit.errors import UserError
from daekit.recipe import load_recipe, load_recipe_text, parse_models, to_yaml
from daekit.recipe.load import load_suite_text, resolve
from tests.helpers.recipes import BASE, errors, load

SUITE = "name: quiz\noutput_dir: out\nbenchmarks: {p: {type: minimal_pairs, path: .}}\n"
MT = "name: quiz\noutput_dir: out\nbenchmarks: {mt: {type: mt_bench, path: ., mode: pairwise-baseline, baseline: BASELINE}}\n"


def details(text: str, *overrides: str) -> dict[str, str]:
    """Key -> reason of everything that is wrong with a recipe."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return {each.key: each.reason for each in caught.value.details}


def suite_details(text: str, *overrides: str, models: dict[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        load_suite_text(text, "suite.yaml", models, overrides)
    return {each.key: each.reason for each in caught.value.details}


def suite_file(folder: Path, text: str) -> str:
    path = folder / "suite.yaml"
    path.write_text(text)
    return json.dumps([str(path)])


# ---- what the loader meets -------------------------------------------------------------------------------------------


def test_an_error_says_key_reason_and_place() -> None:
    with pytest.raises(UserError) as caught:
        load(BASE + "sed: 1\n", "stages.kd.seed=x")
    first, second = caught.value.details
    assert (first.key, first.place) == ("sed", "line 16") and "did you mean 'seed'?" in first.reason
    assert (second.key, second.place) == ("stages.kd.seed", "override 'stages.kd.seed=x'")


@pytest.mark.parametrize(
    "kind", ["minimal_pairs", "perplexity", "multiple_choice", "rows", "lm_eval", "mt_bench", "alpaca_eval"]
)
@pytest.mark.parametrize("written", ["", ", path: null, texts: null, tasks: null", ", path: [1], texts: [1], tasks: {a: 1}"])
def test_a_benchmark_without_its_data(kind: str, written: str) -> None:
    text = f"name: x\noutput_dir: y\nmodels: {{m: a/b}}\nbenchmarks: {{b: {{type: {kind}{written}}}, c: {{type: rows}}}}\n"
    found = suite_details(text)
    assert any(key.startswith("benchmarks.b.") for key in found) and "benchmarks.c.path" in found


def test_an_adapter_of_a_stage_that_cannot_be_read_hides_nothing() -> None:
    kd = {"stages.kd=5", "stages.dae.student={adapter: stage:kd}", "stages.dae.trainer.max_step=3"}
    assert set(details(BASE, *sorted(kd))) == {"stages.kd", "stages.dae.trainer.max_step"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name: "\\ud800"\n', "half of a character"),
        ('"\\udc00": 1\n', "half of a character"),
        (
            'name: "a\\0b"\noutput_dir: "a\\0b"\nsources: {a: {domain: d, path: "./a\\0b"}}\n',
            "cannot be the name of a directory",
        ),
        (f"seed: {'9' * 10_000}\n", "not a finite number"),
        (f"name: {'[' * 60}{']' * 60}\n", "nested too deeply"),
        (f"name: {'{a: ' * 60}1{'}' * 60}\n", "nested too deeply"),
        (f"seed: {2**32}\n", "must be at most 4294967295"),
        (f"stages: {{{'s' * 300}: {{type: sft, data: [a]}}}}\n", "use at most 100 bytes"),
        (f"sources: {{a: {{domain: {'d' * 300}, path: 'builtin:shop'}}}}\n", "use at most 100 bytes"),
        (f"sources: {{a: {{domain: d, path: ./{'d' * 300}}}}}\n", "does not exist"),
        (f"output_dir: {'d' * 300}\n", "cannot be the name of a directory"),
        ("sources: {a: {domain: d, path: ~nobody-of-that-name/x}}\n", "does not exist"),
        ("sources: {a: {domain: \"d\\n\", path: 'builtin:shop'}}\n", "may hold letters"),
    ],
)
def test_odd_values(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe_text(text, "odd.yaml")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_pairs_of_surrogates_are_one_character() -> None:
    assert load(BASE, 'name="\\ud83d\\ude00"').name == "\U0001f600"


@pytest.mark.parametrize(
    "override", ["a." * 3000 + "b=1", "stages.kd.data." + "9" * 5000 + "=1", "seed=" + "[" * 30_000, "=", "\udcff=1"]
)
def test_odd_overrides(override: str) -> None:
    assert len(errors(BASE, override)) == 1


@pytest.mark.parametrize(("keys", "times", "levels"), [(1, 9, 12), (0, 9, 12), (1000, 150, 3)])
def test_a_bomb_of_merge_keys_ends_at_once(keys: int, times: int, levels: int) -> None:
    lines = [f"a0: &a0 {{{', '.join(f'k{at}: 1' for at in range(keys))}}}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * times)}]}}" for n in range(1, levels)]
    start = time.process_time()
    with pytest.raises(UserError, match="this is not a recipe"):
        load_recipe_text("\n".join(lines), "bomb.yaml")
    assert time.process_time() - start < 5


def test_an_output_directory_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, says in ((file, "is a file"), (file / "below", "is a file"), (tmp_path / "link", "leads nowhere")):
        assert says in details(BASE, f"output_dir={path}")["output_dir"]
        cached = f"stages.kd.teacher={{path: some/teacher, cache: {{keep: hidden, path: {path}}}}}"
        assert says in details(BASE, cached)["stages.kd.teacher.cache.path"]
        assert says in suite_details(SUITE + "models: {m: a/b}\n", f"output_dir={path}")["output_dir"]
    (tmp_path / "suite.yaml").write_text(SUITE)
    assert main(["eval", str(tmp_path / "suite.yaml"), "--model", "m=a/b", "--output", str(file)]) == 2
    assert "is a file, not a directory" in capsys.readouterr().err


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(BASE.replace("runs/base", str(tmp_path / "out")))
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
    code += f"from daekit.cli import main; raise SystemExit(main(['check', {str(recipe)!r}]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr


# ---- refused or let through without reason ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "x\n", "", "a" * 300])
def test_a_suite_stays_below_its_directory(name: str, tmp_path: Path) -> None:
    text = SUITE.replace("name: quiz", f"name: {json.dumps(name)}")
    assert "name" in suite_details(text, models={"m": "a/b"})
    assert "evaluation.suites.0.name" in details(BASE, f"evaluation.suites={suite_file(tmp_path, text)}")


def test_names_of_models_end_where_they_seem_to() -> None:
    assert "models.m\n" in suite_details(SUITE, models={"m\n": "a/b"})
    assert list(parse_models(["m\n=a/b"])) != ["m\n"]


def test_overrides_reach_into_every_way_to_write_a_model() -> None:
    text = SUITE.replace("minimal_pairs, path: .", "mt_bench, path: .")
    url = load_suite_text(text, "s", {"m": "http://h:1/v1#served"}, ["models.m.api_key_env=MY_KEY"]).models["m"]
    assert (url.url, url.served_model, url.api_key_env, url.path) == ("http://h:1/v1", "served", "MY_KEY", None)
    adapter = load_suite_text(text, "s", {"m": "base+some/adapter"}, ["models.m.dtype=bfloat16"]).models["m"]
    assert (adapter.path, adapter.adapter, adapter.dtype) == ("base", "some/adapter", "bfloat16")


def test_the_suite_of_a_recipe_measures_the_recipe_s_models(tmp_path: Path) -> None:
    """Its baseline may be a stage, its games between the stages and one model of its own."""
    with_own = suite_file(tmp_path, MT.replace("BASELINE", "kd") + "models: {own: a/b}\nbaseline: dae\n")
    recipe = load(BASE, f"evaluation.suites={with_own}")
    assert recipe.evaluation is not None and recipe.evaluation.suites[0].baseline == "dae"
    for text, key in (
        (MT.replace("BASELINE", "nonsense"), "evaluation.suites.0.benchmarks.mt.baseline"),
        (SUITE + "baseline: nonsense\n", "evaluation.suites.0.baseline"),
        (SUITE + "models: {kd: a/b}\n", "evaluation.suites.0.models.kd"),
    ):
        assert set(details(BASE, f"evaluation.suites={suite_file(tmp_path, text)}")) == {key}


def test_a_suite_is_read_once(tmp_path: Path) -> None:
    recipe = load(BASE, f"evaluation.suites={suite_file(tmp_path, SUITE)}", "evaluation.suites.0.batch_size=3")
    (tmp_path / "suite.yaml").unlink()
    assert load_recipe_text(to_yaml(recipe), "again") == recipe == resolve(recipe)
    assert recipe.evaluation is not None and recipe.evaluation.suites[0].batch_size == 3
    assert load_suite_text(to_yaml(recipe.evaluation.suites[0]), "suite", {"m": "a/b"}).name == "quiz"


def test_two_suites_of_one_name(tmp_path: Path) -> None:
    twice = json.dumps(json.loads(suite_file(tmp_path, SUITE)) * 2)
    assert set(details(BASE, f"evaluation.suites={twice}")) == {"evaluation.suites.1"}


def test_an_error_in_a_suite_names_its_file_and_line(tmp_path: Path) -> None:
    (line,) = errors(BASE, f"evaluation.suites={suite_file(tmp_path, SUITE + 'bach_size: 3')}")
    assert line.startswith(f"{tmp_path}/suite.yaml, line 4: evaluation.suites.0.bach_size: unknown key")


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("stages.kd.student={config: {}}", "stages.kd.student.config.model_type", "needs its `model_type`"),
        ("sources.shop.path=data/my/rows", "sources.shop.path", "does not exist"),
        ("stages.dae.data={shop: a, general: 1}", "stages.dae.data.shop", "wants a number, not a"),
        ("stages.dae.data={general: 1, shop: [1]}", "stages.dae.data.shop", "wants a number, not a list"),
        (
            "stages.dae.data={sources: {shop: 1, general: b}, rows: 9}",
            "stages.dae.data.sources.general",
            "wants a number, not b",
        ),
    ],
)
def test_what_can_be_known_without_opening_anything(override: str, key: str, hint: str) -> None:
    found = details(BASE, override, "tokenizer=t")
    assert hint in found[key] and len(found) == 1


def test_splits_that_may_be() -> None:
    for split in ("train_sft", "train[:10%]", "validation", "en", "default"):
        load(BASE, f"sources.general={{domain: general, path: owner/rows, split: {json.dumps(split)}}}")


def test_another_judge_does_not_keep_the_prices(tmp_path: Path) -> None:
    judge = "judge: {model: gpt-4, base_url: 'https://api.openai.com/v1', price_prompt: 30, price_completion: 60}\n"
    text, models = SUITE + judge, {"m": "a/b"}
    assert set(suite_details(text, "judge.model=other", models=models)) == {"judge.price_prompt", "judge.price_completion"}
    free = ["judge.model=other", "judge.price_prompt=null", "judge.price_completion=0"]
    assert load_suite_text(text, "s", models, free).judge is not None
    assert load_suite_text(text, "s", models, ["judge.concurrency=2"]).judge is not None


@pytest.mark.parametrize("domain", ["reference", "teacher"])
def test_a_domain_may_have_any_name(domain: str) -> None:
    recipe = load(
        BASE, f"sources.shop.domain={domain}", f"stages.dae.teachers={{{domain}: some/expert}}", "stages.dae.reference=r"
    )
    assert list(recipe.stages["dae"].teachers_by_key()) == [("teachers", domain), ("reference",)]


# ---- what the report measures ----------------------------------------------------------------------------------------

EVALUATED = "[kd, student-as-it-was, {other: a/b}, {name: more, path: c/d, dtype: bfloat16}, {early: 'stage:kd@checkpoint-40'}]"


def test_any_model_may_be_evaluated_and_be_the_baseline() -> None:
    for baseline in ("kd", "student-as-it-was", "other", "more", "early"):
        recipe = load(BASE, f"evaluation={{models: {EVALUATED}, baseline: {baseline}}}")
        spec = recipe.evaluation
        assert spec is not None and spec.names == ("kd", "student-as-it-was", "other", "more", "early")
        assert [model.path for model in spec.models] == [None, None, "a/b", "c/d", None]
        assert (spec.models[4].stage, spec.models[4].checkpoint) == ("kd", 40)
        assert [model.is_stage for model in spec.models] == [True, False, False, False, False]
        assert load_recipe_text(to_yaml(recipe), "again") == recipe


@pytest.mark.parametrize(
    ("models", "key"),
    [
        ("[kdd]", "evaluation.models"),
        ("[student-as-it-wos]", "evaluation.models"),
        ("[kd, kd]", "evaluation.models"),
        ("[{kd: a/b}, kd]", "evaluation.models"),
        ("[{x: ./nowhere}]", "evaluation.models.0"),
        ("[{name: x}]", "evaluation.models.0"),
        ("[{path: x}]", "evaluation.models.0.name"),
        ("[{x: 'stage:kdd@checkpoint-4'}]", "evaluation.models.0"),
        ("[{../x: a/b}]", "evaluation.models.0"),
        ("[5]", "evaluation.models"),
        ("[[a]]", "evaluation.models.0"),
        ("[{x: {adapter: a}}]", "evaluation.models.0"),
    ],
)
def test_models_that_cannot_be_evaluated(models: str, key: str) -> None:
    found = details(BASE, f"evaluation={{models: {models}}}")
    assert [each.startswith(key) for each in found] == [True]


def test_a_checkpoint_of_an_earlier_stage() -> None:
    recipe = load(BASE, "stages.dae.student=stage:kd@checkpoint-40", "stages.dae.reference={stage: kd, checkpoint: 20}")
    dae: Any = recipe.stages["dae"]
    assert (dae.student.stage, dae.student.checkpoint, dae.reference.model.checkpoint) == ("kd", 40, 20)
    assert load_recipe_text(to_yaml(recipe), "again") == recipe
    assert "stages.kd.student" in details(BASE, "stages.kd.student=stage:dae@checkpoint-4")
    assert "stages.kd.student.checkpoint" in details(BASE, "stages.kd.student.checkpoint=4")
    assert "checkpoint" in details(BASE, "stages.dae.student=stage:kd@checkpont-4")["stages.dae.student"]


def test_a_file_whose_name_cannot_be_opened() -> None:
    for name in ("a\0b", "x" * 5000, "~nobody-of-that-name/x"):
        with pytest.raises(UserError, match="cannot be read"):
            load_recipe(name)
