"""The JSON Schemas: current, named by every YAML that ships, taking what daekit takes; and the recipes that users can copy."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from daekit.cli import main
from daekit.recipe import load_recipe_text
from daekit.recipe.json_schema import json_schema
from daekit.recipe.model import ModelSpec
from daekit.recipe.objective import Objective
from daekit.recipe.shipped import shipped_recipes
from daekit.recipe.validation import Errors
from tests.helpers.json_schema import fits, modeline
from tests.helpers.recipes import BASE, RECIPES, ROOT

SCHEMAS = {"recipe": ROOT / "recipes" / "recipe.schema.json", "suite": ROOT / "eval" / "suites" / "suite.schema.json"}
SUITES = sorted((ROOT / "eval" / "suites").glob("*.yaml"))
OTHERS = [ROOT / "daekit" / "resources" / "quickstart.yaml", *sorted((ROOT / "benchmarks").glob("*/*.yaml"))]


def plain(text: str) -> Any:
    errors = Errors("test.yaml")
    tree = errors.read(text)
    assert not errors.found
    return tree.plain()


def without_options(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the installed versions of TRL and transformers."""
    return schema | {"$defs": {name: each for name, each in schema["$defs"].items() if name != "TrainerOptions"}}


@pytest.mark.parametrize("kind", ["recipe", "suite"])
def test_the_committed_schema_is_current(kind: Any) -> None:
    committed, now = json.loads(SCHEMAS[kind].read_text(encoding="utf-8")), json_schema(kind)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if any(importlib.metadata.version(package) != pins[package] for package in ("trl", "transformers")):
        committed, now = without_options(committed), without_options(now)
    assert committed == now, f"run: daekit schema {kind} > {SCHEMAS[kind].relative_to(ROOT)}"


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "suite"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema("suite")


@pytest.mark.parametrize("path", [*RECIPES, *OTHERS, *SUITES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_yaml_names_its_schema_and_fits_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    file = (path.parent / modeline(text)).resolve()
    assert file == SCHEMAS["suite" if path in SUITES else "recipe"]
    schema = json.loads(file.read_text(encoding="utf-8"))
    assert fits(plain(text), schema, schema)


SHORT = [
    "stages.kd.student={from: a/b, shape: {hidden_size: 8}}",
    "stages.kd.teacher={ensemble: [{model: a, weight: 1}], average: probabilities}",
    "stages.dae.teachers.ecommerce={stage: kd, quantization: 4bit}",
    "stages.kd.data={sources: [general], rows: null}",
    "stages.kd.loss={attention_weight: 1, attention_layers: [[0, 1]]}",
    "stages.kd.trainer={max_steps: 3, lr_scheduler_type: cosine, report_to: [none]}",
    "tokenizer={train: {vocab_size: 9}}",
    "evaluation={models: [kd, student-as-it-was, {other: a/b}, {name: x, path: a/b}]}",
]
WRONG = [
    "stages.kd.lerning=1",
    "stages.kd.reference=a",
    "stages.kd.loss.temperature=0",
    "stages.kd.trainer.learning_rat=1",
    "stages.kd.data=5",
    "stages.kd.type=sftt",
    "sources.shop={path: a}",
    "seed=-1",
]


@pytest.mark.parametrize(("overrides", "right"), [*((each, True) for each in SHORT), *((each, False) for each in WRONG)])
def test_the_schema_takes_what_daekit_takes(overrides: str, right: bool) -> None:
    from daekit.recipe.load import apply_overrides

    errors = Errors("test.yaml")
    errors.root = errors.read(BASE)
    apply_overrides(errors, [overrides])
    schema = json_schema("recipe")
    assert fits(errors.root.plain(), schema, schema) is right
    if right:
        load_recipe_text(BASE, "test.yaml", [overrides])


def test_every_key_is_documented() -> None:
    undocumented = []
    for kind in SCHEMAS:
        for name, each in json_schema(kind)["$defs"].items():  # type: ignore[arg-type]
            for whole in [each, *each.get("anyOf", [])]:
                for key, below in whole.get("properties", {}).items():
                    if key not in ("type", "trainer") and not below.get("description") and name != "MixtureSpec":
                        undocumented.append(f"{name}.{key}")
    assert undocumented == []
    assert all(each.description for each in Objective.model_fields.values())


def test_a_model_may_be_extended_where_its_parts_are_not_known() -> None:
    class Renamed(ModelSpec):
        alias: str = ""

    made = Renamed.model_validate({"from": "a/b", "shape": {"hidden_size": 8}})
    assert made.init is not None and made.init.from_ == ModelSpec(path="a/b")


def test_recipes_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(shipped_recipes())
    assert {file.resolve() for file in shipped_recipes().values()} == set(RECIPES)
    for path in RECIPES:
        assert main(["recipes", "copy", path.stem]) == 0
        copied = (tmp_path / path.name).read_text(encoding="utf-8")
        assert modeline(copied) == "recipe.schema.json"
        assert copied.partition("\n")[2] == path.read_text(encoding="utf-8").partition("\n")[2]
    assert (tmp_path / "recipe.schema.json").read_text() == SCHEMAS["recipe"].read_text()
    (tmp_path / "ensemble.yaml").write_text("mine")
    assert main(["recipes", "copy", "ensemble"]) == 2
    assert (tmp_path / "ensemble.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "ensembel"]) == 2
    assert "did you mean 'ensemble'?" in capsys.readouterr().err
