"""Who cannot be asked is told before hours of answers, or of training: no key, nobody there, a key that is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from daekit.cli import main
from daekit.errors import UserError
from daekit.generation import Permissions
from daekit.generation.caller import require_answering
from daekit.generation.keys import endpoint_key, required_key
from daekit.recipe import Recipe, load_recipe_text
from daekit.recipe.judge import JudgeSpec
from daekit.runtime.prepare import prepare
from tests.helpers import tiny
from tests.helpers.adapter_world import save_base
from tests.helpers.judge_server import JudgeServer, closed_url

OPENAI = "https://api.openai.com/v1"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as it:
        yield it


@pytest.mark.parametrize(
    ("url", "variable", "said"),
    [
        ("https://far.example/v1", "FAR_API_KEY", r"^judge\.api_key_env: FAR_API_KEY is not set\. .*key of far\.example"),
        (OPENAI, None, r"^judge: api\.openai\.com wants a key, and OPENAI_API_KEY is not set"),
        (OPENAI, "MY_API_KEY", r"^judge\.api_key_env: MY_API_KEY is not set"),
    ],
)
def test_a_key_that_is_wanted_must_be_there(url: str, variable: str | None, said: str, monkeypatch: Any) -> None:
    for name in ("FAR_API_KEY", "MY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, " \n")
    with pytest.raises(UserError, match=said):
        required_key("judge", url, variable, Permissions())
    assert endpoint_key("judge", url, variable, Permissions()) == "", "what was kept is read without a key"
    monkeypatch.setenv(variable or "OPENAI_API_KEY", "sk-key")
    assert required_key("judge", url, variable, Permissions()) == "sk-key"
    assert required_key("judge", "https://far.example/v1", None, Permissions()) == ""


@pytest.mark.parametrize("status", [200, 403, 404, 405, 429, 500, 301])
def test_most_answers_to_a_look_prove_nothing(status: int, server: JudgeServer) -> None:
    server.looked = status
    require_answering("judge", JudgeSpec(model="m", base_url=server.url), Permissions())
    assert server.got == ["/v1/models"]


def test_a_refused_key_is_told_and_never_shown(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_API_KEY", "sk-very-secret")
    server.looked, server.bodies["GET"] = 401, b"sk-very-secret is unknown"
    with pytest.raises(UserError, match=r"judge m at http.*the key in FAR_API_KEY is refused \(HTTP 401") as told:
        require_answering("judge", JudgeSpec(model="m", base_url=server.url, api_key_env="FAR_API_KEY"), Permissions())
    assert "very" not in str(told.value)


# ---- suites ----------------------------------------------------------------------------------------------------------


def suite_of(folder: Path, judge: dict[str, Any]) -> Path:
    pytest.importorskip("alpaca_eval")
    (folder / "a.json").write_text(json.dumps([{"instruction": f"w{at} w1", "output": "w2"} for at in range(4)]))
    benchmark = {"type": "alpaca_eval", "annotator": "alpaca_eval_gpt4", "path": str(folder / "a.json"), "max_new_tokens": 3}
    suite = {"name": "s", "output_dir": str(folder / "out"), "bootstrap": 50, "judge": judge, "benchmarks": {"a": benchmark}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def unusable(what: str, server: JudgeServer) -> tuple[dict[str, Any], str]:
    """A judge that cannot be used, and what is said of it."""
    if what == "unset":
        return {"model": "j", "base_url": server.url, "api_key_env": "NOT_SET_API_KEY"}, "NOT_SET_API_KEY is not set"
    if what == "refused":
        server.looked = 401
        return {"model": "j", "base_url": server.url}, f"judge j at {server.url}: it wants a key, and none was sent (HTTP 401"
    url = closed_url()
    return {"model": "j", "base_url": url}, f"judge j at {url}: not reached (connection refused)"


@pytest.mark.parametrize("what", ["unset", "refused", "closed"])
def test_a_judge_that_cannot_be_used_is_told_before_any_answer(
    what: str, server: JudgeServer, tmp_path: Path, capsys: Any
) -> None:
    judge, said = unusable(what, server)
    command = ["eval", str(suite_of(tmp_path, judge)), "--model"]
    with JudgeServer() as far:
        assert main([*command, f"far={far.url}#m", "--dry-run"]) == 0, "which asks nobody, and needs no key"
        assert main([*command, f"far={far.url}#m"]) == 2
        assert far.calls == server.calls == []
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_served_model_that_cannot_be_used_is_told_before_the_answers_of_others(
    server: JudgeServer, tmp_path: Path, capsys: Any
) -> None:
    suite, url = suite_of(tmp_path, {"model": "j", "base_url": server.url}), closed_url()
    assert main(["eval", str(suite), "--model", f"far={server.url}#m", "--model", f"gone={url}#m"]) == 2
    assert server.calls == [] and f"models.gone m at {url}: not reached" in capsys.readouterr().err


def test_who_has_answered_everything_is_not_asked(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_API_KEY", "sk-key")
    judge = {"model": "j", "base_url": server.url, "api_key_env": "FAR_API_KEY"}
    command = ["eval", str(suite_of(tmp_path, judge)), "--model", f"far={server.url}#m"]
    assert main(command) == 0
    asked = len(server.got)
    assert asked == 2, "the model without a key, the judge with its own"
    monkeypatch.delenv("FAR_API_KEY")
    assert main(command) == 0
    assert len(server.got) == asked and len(server.calls) == 8


def test_an_annotator_is_named_with_its_place(server: JudgeServer, tmp_path: Path, capsys: Any) -> None:
    command = ["eval", str(suite_of(tmp_path, {"model": "j", "base_url": server.url})), "--model", f"far={server.url}#m"]
    for name, hint in (
        ("nope", ", such as weighted_alpaca_eval_gpt4_turbo"),
        ("alpaca_eval_gpt", "did you mean 'alpaca_eval_gpt4'"),
    ):
        assert main([*command, f"benchmarks.a.annotator={name}"]) == 2
        told = capsys.readouterr().err
        assert f"error: benchmarks.a.annotator: '{name}' is neither" in told and hint in told


# ---- recipes ---------------------------------------------------------------------------------------------------------

RECIPE = """
name: judged
output_dir: OUT/run
sources:
  chat: {domain: general, path: OUT/general.jsonl, holdout: 4}
stages:
  only: {type: sft, student: OUT/base, data: [chat], trainer: {max_steps: 2, max_length: 64, per_device_train_batch_size: 4}}
evaluation: {suites: [OUT/suite.yaml]}
"""


def judged_recipe(folder: Path) -> Recipe:
    """The recipe, with its model and rows; its suite is there already."""
    save_base(folder / "base")
    tiny.rows(24, domains=("general",)).remove_columns("domain").to_json(folder / "general.jsonl")
    return load_recipe_text(RECIPE.replace("OUT", str(folder)), "judged.yaml")


def test_a_judge_of_this_machine_may_be_started_when_the_training_is_over(server: JudgeServer, tmp_path: Path) -> None:
    """It may need the device that trains."""
    judge, said = unusable("closed", server)
    suite_of(tmp_path, judge)
    ready = prepare(judged_recipe(tmp_path))
    assert [note for note in ready.notes if said in note and "when the training is over" in note]


@pytest.mark.parametrize("what", ["unset", "refused", "annotator"])
def test_a_recipe_is_told_before_its_first_stage(what: str, server: JudgeServer, tmp_path: Path) -> None:
    judge, said = ({"model": "j", "base_url": server.url}, "benchmarks.a.annotator: 'alpaca_eval_gpt'")
    if what != "annotator":
        judge, said = unusable(what, server)
    suite = suite_of(tmp_path, judge)
    if what == "annotator":
        suite.write_text(suite.read_text().replace("alpaca_eval_gpt4", "alpaca_eval_gpt"))
    with pytest.raises(UserError, match=r"^evaluation\.suites\.0: ") as told:
        prepare(judged_recipe(tmp_path))
    assert said in str(told.value)
    server.looked = 200
    suite_of(tmp_path, {"model": "j", "base_url": server.url})
    before = len(server.got)
    prepare(judged_recipe(tmp_path))
    assert len(server.got) == before + 1 and server.calls == []


def test_suites_need_no_validation_rows(tmp_path: Path, server: JudgeServer) -> None:
    suite_of(tmp_path, {"model": "j", "base_url": server.url})
    save_base(tmp_path / "base")
    tiny.rows(24, domains=("general",)).remove_columns("domain").to_json(tmp_path / "general.jsonl")
    text = RECIPE.replace("OUT", str(tmp_path)).replace(", holdout: 4", "")
    assert len(prepare(load_recipe_text(text, "judged.yaml")).suites) == 1
