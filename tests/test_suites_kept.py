"""What a suite keeps on the disk: nothing that is stale, nothing that is secret, and nothing that a kill could break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from daekit.cli import main
from daekit.errors import UserError
from daekit.evaluation.answers import AnswerStore
from daekit.evaluation.models import file_fingerprint, tokenizer_fingerprint
from daekit.evaluation.suites import run_suite
from daekit.generation.local_chat import model_fingerprint
from daekit.recipe.load import load_suite_text, parse_models
from daekit.report import read_rows
from tests.helpers import tiny
from tests.helpers.judge_server import JudgeServer
from tests.helpers.suite_world import build_world, save


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("url", ["http://me:hunter2@127.0.0.1:9/v1#m", "http://127.0.0.1:9/v1?key=hunter2#m"])
def test_credentials_in_the_url_of_a_model_are_refused_before_anything_is_written(url, tmp_path, capsys):
    line = {"question_id": 81, "category": "math", "turns": ["w1", "w2"]}
    (tmp_path / "question.jsonl").write_text(json.dumps(line))
    suite = {
        "name": "s",
        "output_dir": str(tmp_path / "out"),
        "benchmarks": {"mt": {"type": "mt_bench", "path": str(tmp_path), "max_new_tokens": 3}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert main(["eval", str(tmp_path / "suite.yaml"), "--model", f"far={url}"]) == 2
    said = capsys.readouterr()
    assert "models.far" in said.err and "credentials" in said.err
    assert "hunter2" not in said.err + said.out
    assert not (tmp_path / "out").exists()


def test_a_reference_trained_again_is_measured_again(world, tmp_path):
    reference = save(tmp_path / "reference", 0)
    text, models = (world / "suite.yaml").read_text(), parse_models([f"one={world / 'one'}"])
    changes = [f"output_dir={tmp_path / 'out'}", f"benchmarks.general.reference.path={reference}", "baseline=null"]
    suite = load_suite_text(text, "s", models, [*changes, "benchmarks.general.generate=false"])

    def distance() -> float:
        run_suite(suite)
        rows = read_rows((tmp_path / "out" / "report.json").read_text())
        (row,) = [row for row in rows if row.metric == "kl_to_reference"]
        return row.value

    assert distance() == pytest.approx(0, abs=1e-6)
    save(reference, 1)
    assert distance() > 0.01


@pytest.mark.parametrize("known_by", [file_fingerprint, lambda folder: model_fingerprint(str(folder))])
def test_a_change_anywhere_in_the_weights_makes_another_model(known_by, tmp_path):
    file = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_file({"weight": torch.randn(2_000_000)}, file)
    before = known_by(tmp_path)
    assert known_by(tmp_path) == before
    weights = load_file(file)
    weights["weight"] = weights["weight"].clone()
    weights["weight"][1_000_003:1_000_043] += 1  # a bias of one layer
    save_file(weights, file)
    assert known_by(tmp_path) != before


def test_tokenizers_that_only_cut_otherwise_are_told_apart(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    before = tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
    used = AutoTokenizer.from_pretrained(tmp_path)
    used(["w1", "w2 w3"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(used) == before
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    facts["normalizer"] = {"type": "Replace", "pattern": {"String": "w1"}, "content": "w2"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) != before


def test_chat_templates_are_compared_by_the_tokens_that_they_make():
    tokenizer = tiny.tokenizer()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    seen = []
    for each in (template, template.replace("for m in", "for  m  in")):
        tokenizer.chat_template = each
        seen.append(tokenizer_fingerprint(tokenizer))
    assert seen[0] == seen[1]
    tokenizer.chat_template = template.replace("{{ m.role }} ", "w1 {{ m.role }} ")
    assert tokenizer_fingerprint(tokenizer) != seen[0]
    tokenizer.chat_template = "{{ strftime_now('%H:%M:%S.%f') }} w2"
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = None
    assert tokenizer_fingerprint(tokenizer) != seen[0]


def test_models_that_drop_other_rows_are_not_compared(world, tmp_path):
    other = save(tmp_path / "other", 3)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["w1 w2", "w3 w4", "w5"])  # some rows are shorter
    tokenizer.save_pretrained(other)
    rows = [{"prompt": "w1 w2 w1 w2 w1 w2", "completion": "w7"}, *({"prompt": "w6", "completion": "w7"} for _ in range(3))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = {
        "name": "s",
        "output_dir": str(tmp_path / "out"),
        "benchmarks": {
            "rows": {
                "type": "rows",
                "path": str(tmp_path / "rows.jsonl"),
                "max_length": 6,
                "overlong": "drop",
                "generate": False,
            }
        },
    }
    models = parse_models([f"one={world / 'one'}", f"other={other}"])
    with pytest.raises(UserError, match=r"benchmarks\.rows.*models\.one and models\.other.*max_length"):
        run_suite(load_suite_text(yaml.safe_dump(suite), "s", models))
    assert not (tmp_path / "out").exists()


def test_limits_hold_for_all_benchmarks_of_one_judge(world, tmp_path, capsys):
    pytest.importorskip("alpaca_eval")
    for name in ("a", "b"):
        reference = [{"instruction": f"{name} w{at}", "output": f"w{at}", "generator": "ref"} for at in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(reference))
    benchmark = {"type": "alpaca_eval", "annotator": "alpaca_eval_gpt4", "max_new_tokens": 3}
    with JudgeServer() as server:
        suite = {
            "name": "s",
            "output_dir": str(tmp_path / "out"),
            "bootstrap": 50,
            "judge": {"model": "scripted", "base_url": server.url},
            "benchmarks": {name: {**benchmark, "path": str(tmp_path / f"{name}.json")} for name in ("a", "b")},
        }
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        command = ["eval", str(tmp_path / "suite.yaml"), "--model", f"one={world / 'one'}"]
        assert main([*command, "--max-calls", "5"]) == 2
        assert len(server.calls) == 5
        assert "max_calls=5 is reached" in capsys.readouterr().err
        judges = json.loads((tmp_path / "out" / "manifest.json").read_text())["judges"]
        assert [judges[name]["calls"]["sent"] for name in ("a", "b")] == [4, 1]
        assert main([*command, "--max-calls", "5"]) == 0
        assert len(server.calls) == 8


def test_what_answers_depend_on_survives_a_kill(tmp_path):
    AnswerStore(tmp_path, "m", {"how": 1})
    (tmp_path / "m.jsonl").write_text("")
    facts = tmp_path / "m.json"
    before = facts.stat().st_mtime_ns, facts.stat().st_ino
    AnswerStore(tmp_path, "m", {"how": 1})
    assert (facts.stat().st_mtime_ns, facts.stat().st_ino) == before  # not written again, so nothing can tear it
    facts.write_text('{"ho')
    with pytest.raises(UserError, match=r"m\.json.*damaged"):
        AnswerStore(tmp_path, "m", {"how": 1})


@pytest.mark.parametrize("change", ["annotator=alpaca_eval_gpt", "path={}/broken.json"])
def test_what_the_judge_cannot_be_asked_is_said_before_any_answer(change, world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("alpaca_eval")
    monkeypatch.setattr("daekit.evaluation.models.load_model", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "w1", "output": "w2"}]))
    (tmp_path / "broken.json").write_text(json.dumps([{"instruction": "w1"}]))
    suite = {
        "name": "s",
        "output_dir": str(tmp_path / "out"),
        "judge": {"model": "scripted", "base_url": "http://127.0.0.1:9/v1"},
        "benchmarks": {"a": {"type": "alpaca_eval", "annotator": "alpaca_eval_gpt4", "path": str(tmp_path / "a.json")}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    command = ["eval", str(tmp_path / "suite.yaml"), "--model", f"one={world / 'one'}"]
    assert main([*command, f"benchmarks.a.{change.format(tmp_path)}"]) == 2
    assert change.split("=")[0] in capsys.readouterr().err or "broken.json" in change
