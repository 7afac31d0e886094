"""Suites end to end, through the command line: small models from directories, adapters and endpoints, a scripted judge."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from daekit.cli import main
from daekit.errors import UserError
from daekit.evaluation import suites
from daekit.evaluation.models import SuiteModel, file_fingerprint
from daekit.evaluation.suites import Options, run_suite
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.load import load_suite_text, parse_models
from daekit.recipe.suite import SuiteModelSpec
from daekit.report import read_rows
from tests.helpers import tiny
from tests.helpers.judge_server import JudgeServer
from tests.helpers.shared_data import DATA
from tests.helpers.suite_world import build_world, save

MT_BENCH = DATA / "mt_bench"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def by_key(path: Path) -> dict[tuple[str, str, str], float]:
    return {(row.model, row.domain, row.metric): row.value for row in read_rows((path / "report.json").read_text())}


def test_several_models_in_one_report(world, capsys):
    models = ["--model", f"one={world / 'one'}", "--model", f"two={world / 'two'}", "--model", f"tuned={world / 'adapter'}"]
    models += ["--model", f"same={world / 'one'}+{world / 'adapter'}"]
    assert main(["eval", str(world / "suite.yaml"), *models]) == 0
    out = world / "out"
    values = by_key(out)
    assert values["one", "general", "kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert values["tuned", "general", "kl_to_reference"] > 0.01
    for (model, domain, metric), value in values.items():
        if model == "same":
            assert value == values["tuned", domain, metric]
    assert values["two", "english", "bits_per_byte_forgetting"] == pytest.approx(
        values["two", "english", "bits_per_byte"] - values["one", "english", "bits_per_byte"]
    )
    assert values["two", "blimp", "accuracy_gain"] == pytest.approx(
        values["two", "blimp", "accuracy"] - values["one", "blimp", "accuracy"]
    )
    parts = [values["two", f"blimp/paradigm_{at}", "accuracy"] for at in range(6)]
    assert values["two", "blimp", "accuracy"] == pytest.approx(np.mean(parts))
    page = (out / "report.html").read_text()
    assert "blimp: accuracy" in page and "paradigm_3" in page and "4 models" in page
    assert "tuned" in (out / "report.md").read_text()
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["models"]["one"]["weights"] != facts["models"]["tuned"]["weights"] == facts["models"]["same"]["weights"]
    assert facts["data"]["blimp"].keys() == {f"paradigm_{at}.jsonl" for at in range(6)}
    assert len((out / "blimp" / "items" / "one.jsonl").read_text().splitlines()) == 48
    table = capsys.readouterr().out
    assert "blimp" in table and "Report:" in table

    # again: nothing is measured, and the report is the same
    before = {file: file.read_bytes() for file in sorted(out.rglob("report.json"))}
    assert main(["eval", str(world / "suite.yaml"), *models]) == 0
    assert capsys.readouterr().out.count("measured before, kept") == 16
    assert all(file.read_bytes() == content for file, content in before.items())
    # another limit: only that benchmark
    assert main(["eval", str(world / "suite.yaml"), *models, "benchmarks.blimp.limit=3"]) == 0
    assert capsys.readouterr().out.count("measured before, kept") == 12


def test_other_weights_under_the_same_name_are_measured_again(world, tmp_path, capsys):
    command = ["eval", str(world / "suite.yaml"), "--output", str(tmp_path / "out"), "baseline=null"]
    assert main([*command, "--model", f"m={world / 'one'}"]) == 0
    capsys.readouterr()
    assert main([*command, "--model", f"m={world / 'two'}"]) == 0
    assert "kept" not in capsys.readouterr().out


def test_a_dry_run_does_nothing(world, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", str(world / "suite.yaml"), "--output", str(out), "--dry-run", "--model", f"one={world / 'one'}"]
    assert main(command) == 0
    assert "blimp: MinimalPairs" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "m=some/./missing/model"], "does not exist"),
        (["--model", "m=http://localhost:9/v1#x"], "likelihood of given text"),
        (["baseline=two", "--model", "one={one}"], "no model 'two'"),
        (["--model", "one={empty}"], "models.one: no model could be found"),
        (["--model", "one=nowhere/nothing"], "found at nowhere/nothing, which is no directory here"),
        (["--model", "one={one}", "reference_domains=[generl, text]"], "reference_domains: there is no domain 'generl'"),
        (["--model", "one={other}"], "general.reference: its tokenizer is not that of models.one"),
        (["--model", "one={other}"], "only models.one's tokenizer has 1 tokens (such as 'new')"),
        (["--model", "one={one}+{two}"], "adapter_config.json cannot be read"),
        (["--model", "one={one}", "benchmarks.text.window=1024"], "1024 tokens are more than the 256"),
        (["--model", "one={one}", "benchmarks.blimp.prefix=bos"], "no such token"),
    ],
)
def test_bad_input_is_one_sentence_before_any_weight(world, tmp_path, monkeypatch, capsys, arguments, says):
    other = save(tmp_path / "other", 3)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    (tmp_path / "empty").mkdir()
    places = {"one": world / "one", "two": world / "two", "other": other, "empty": tmp_path / "empty"}
    filled = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr("daekit.evaluation.models.load_model", lambda *_: pytest.fail("weights were loaded"))
    assert main(["eval", str(world / "suite.yaml"), "--output", str(tmp_path / "out"), "baseline=one", *filled]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_an_output_directory_of_another_suite_is_refused(world, tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text("name: else\n")
    command = ["eval", str(world / "suite.yaml"), "--output", str(tmp_path), "--model", f"one={world / 'one'}"]
    assert main(command) == 2
    assert "holds the suite 'else'" in capsys.readouterr().err


def test_a_refused_suite_writes_nothing_into_the_folder_of_another(tmp_path, world, capsys):
    questions(tmp_path / "questions")
    assert main(["eval", asking(tmp_path), "--model", f"one={world / 'one'}"]) == 0
    answers = tmp_path / "out" / "mt" / "model_answer" / "one.jsonl"
    answers.write_bytes(answers.read_bytes()[:-9])  # its run was killed
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = yaml.safe_load((tmp_path / "suite.yaml").read_text()) | {"name": "other"}
    other["judge"] = {"model": "judge", "base_url": "http://127.0.0.1:9/v1"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert (
        main(["eval", str(tmp_path / "other.yaml"), "--model", f"two={world / 'two'}", "--model", f"one={world / 'one'}"]) == 2
    )
    assert "holds the suite 'asked'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("judged", [True, False])
def test_an_endpoint_that_may_not_be_asked_is_refused_before_anything_is_written(judged, tmp_path, world, capsys, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    questions(tmp_path / "questions")
    asking(
        tmp_path, **({"model": "judge", "base_url": "https://far.example/v1", "api_key_env": "DATABASE_URL"} if judged else {})
    )
    models = ["--model", f"one={world / 'one'}" if judged else "far=http://far.example/v1#m"]
    assert main(["eval", str(tmp_path / "suite.yaml"), *models]) == 2
    said = capsys.readouterr().err
    assert ("--allow-key-env DATABASE_URL" if judged else "--allow-http") in said and "secret" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("judge", "said"), [("nowhere", "does not exist"), ("silent", "has no chat template"), ("x", "no tokenizer")]
)
def test_a_local_judge_that_cannot_judge_is_told_before_anything_is_written(judge, said, tmp_path, world, capsys):
    questions(tmp_path / "questions")
    (tmp_path / "x").mkdir()
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "silent")
    assert main(["eval", asking(tmp_path, path=str(tmp_path / judge)), "--model", f"one={world / 'one'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trust_is_given_to_the_path_and_not_to_the_base_that_an_adapter_names(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save(base, 0)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    adapter.mkdir()
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    model = SuiteModel("m", SuiteModelSpec(path=str(adapter), trust_remote_code=True))
    with pytest.raises(UserError):
        _ = model.config
    with contextlib.suppress(UserError):  # without its own code the tokenizer may be an ordinary one
        _ = model.tokenizer
    assert not (tmp_path / "ran").exists()
    facts["base_model_name_or_path"] = str(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="leads back to the adapter itself"):
        _ = SuiteModel("m", SuiteModelSpec(path=str(adapter))).config


def test_models_of_two_tokenizers_are_compared_by_bytes_only(world, tmp_path):
    other = save(tmp_path / "other", 3)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    text = (world / "suite.yaml").read_text()
    models = parse_models([f"one={world / 'one'}", f"other={other}"])
    out = f"output_dir={tmp_path / 'out'}"
    report = run_suite(load_suite_text(text, "s", models, [out, "benchmarks.general.reference=null"]))
    metrics = {row.metric for row in report.rows if row.model == "other"}
    assert "bits_per_byte_forgetting" in metrics and "accuracy_gain" in metrics
    assert not metrics & {"nll_gain", "nll_forgetting", "token_accuracy_forgetting"}
    assert any("do not share a tokenizer" in note for note in report.notes)


def test_identity_knows_other_weights_and_loads_none(world, monkeypatch):
    monkeypatch.setattr("daekit.evaluation.models.load_model", lambda *_: pytest.fail("weights were loaded"))
    found = [SuiteModel("m", SuiteModelSpec(path=str(world / name))).identity for name in ("one", "two", "one")]
    assert found[0] == found[2] and found[0]["files"] != found[1]["files"]
    assert file_fingerprint(Path("some/hub-id")) is None


# ---- questions, endpoints and judges ---------------------------------------------------------------------------------


def questions(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    categories = ["writing", "math", "stem"]
    lines = [
        {"question_id": 81 + at, "category": categories[at % 3], "turns": [f"w{at} w1", f"w{at} w2"]} for at in range(count)
    ]
    (folder / "question.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def asking(folder: Path, **judge) -> str:
    suite = {
        "name": "asked",
        "output_dir": str(folder / "out"),
        "bootstrap": 100,
        "batch_size": 4,
        "benchmarks": {"mt": {"type": "mt_bench", "path": str(folder / "questions"), "max_new_tokens": 5}},
    }
    if judge:
        suite["judge"] = judge
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return str(path)


def test_answers_from_a_directory_and_from_an_endpoint(world, tmp_path, capsys):
    questions(tmp_path / "questions")
    suite = asking(tmp_path)
    with JudgeServer(lambda call: "429" if call.attempt == 0 and call.one_in(3) else None) as server:
        command = ["eval", suite, "--model", f"one={world / 'one'}", "--model", f"far={server.url}#served"]
        assert main(command) == 0
        calls = len(server.answered)
        assert calls == 12  # six questions of two turns
        assert {call.body["model"] for call in server.calls} == {"served"}
        temperatures = {call.body["messages"][0]["content"]: call.body["temperature"] for call in server.calls}
        assert temperatures == {f"w{at} w1": [0.7, 0.0, 0.1][at % 3] for at in range(6)}
        assert main(command) == 0
        assert len(server.answered) == calls  # nothing is asked again
    for name in ("one", "far"):
        lines = (tmp_path / "out" / "mt" / "model_answer" / f"{name}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["question_id"] for line in lines) == list(range(81, 87))
    assert "answered, but not judged" in (tmp_path / "out" / "report.md").read_text()
    printed = capsys.readouterr().out
    assert "note: mt: answered, but not judged: the suite names no judge.\n" in printed and "─" not in printed
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in samples} == {"one", "far"}


def test_an_endpoint_that_does_not_answer_all_is_asked_for_the_rest(tmp_path, capsys):
    questions(tmp_path / "questions")
    suite = asking(tmp_path)
    broken = [True]
    with JudgeServer(lambda call: "400" if broken[0] and "w3" in call.body["messages"][0]["content"] else None) as server:
        command = ["eval", suite, "--model", f"far={server.url}#served"]
        assert main(command) == 2
        assert "did not answer 1 of 6 questions" in capsys.readouterr().err
        broken[0], before = False, len(server.calls)
        assert main(command) == 0
        assert len(server.calls) == before + 2


def test_a_model_without_chat_template_cannot_be_asked(tmp_path, capsys):
    questions(tmp_path / "questions")
    save(tmp_path / "bare", 0, template=False)
    assert main(["eval", asking(tmp_path), "--model", f"bare={tmp_path / 'bare'}"]) == 2
    assert "models.bare has no chat template" in capsys.readouterr().err


@pytest.mark.skipif(not MT_BENCH.is_dir(), reason="no MT-Bench data here")
def test_mt_bench_judged_and_read_by_show_result(world, tmp_path, capsys):
    pytest.importorskip("fastchat")
    (tmp_path / "questions").symlink_to(MT_BENCH)
    with JudgeServer() as server:
        suite = asking(tmp_path, model="scripted", base_url=server.url, max_retries=1)
        command = ["eval", suite, "benchmarks.mt.limit=12", "benchmarks.mt.max_new_tokens=4"]
        command += ["--model", f"one={world / 'one'}", "--model", f"two={world / 'two'}"]
        assert main([*command, "--dry-run"]) == 0
        assert "12 of 12 questions to answer" in (printed := capsys.readouterr().out) and "48 calls" in printed
        assert not (tmp_path / "out").exists()
        assert main([*command, "--max-calls", "20"]) == 2
        said = capsys.readouterr().err
        assert "withheld" in said and "max_calls=20 is reached" in said
        assert len(server.calls) == 20
        assert not any(key[2] == "judge_score" for key in by_key(tmp_path / "out"))
        assert main(command) == 0
        assert len(server.answered) == 48 and len(server.calls) == 48
    values = by_key(tmp_path / "out")
    file = tmp_path / "out" / "mt" / "model_judgment" / "scripted_single.jsonl"
    shown = subprocess.run(
        [sys.executable, "-m", "fastchat.llm_judge.show_result", "--input-file", str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.split() for line in shown.split("Average")[1].splitlines() if line[:3] in ("one", "two")]
    average = {words[0]: float(words[-1]) for words in lines}
    assert average.keys() == {"one", "two"}
    for model, score in average.items():
        assert values[model, "mt", "judge_score"] == pytest.approx(score, abs=1e-6)
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["judges"]["mt"] and facts["data"]["mt"]["questions"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mt: score, 1 to 10" in page or "mt/turn_1" in page
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])["mark"].count("·") == 1


def test_alpaca_eval_on_a_local_set(world, tmp_path, capsys):
    pytest.importorskip("alpaca_eval")
    reference = [{"instruction": f"w{at} w{at + 1}", "output": f"w{at}", "generator": "ref"} for at in range(8)]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    with JudgeServer() as server:
        text = {
            "name": "alpaca",
            "output_dir": str(tmp_path / "out"),
            "bootstrap": 100,
            "judge": {"model": "scripted", "base_url": server.url},
            "benchmarks": {
                "alpaca_eval": {
                    "type": "alpaca_eval",
                    "path": str(tmp_path / "reference.json"),
                    "annotator": "alpaca_eval_gpt4",
                    "max_new_tokens": 4,
                }
            },
        }
        report = run_suite(load_suite_text(yaml.safe_dump(text), "s", parse_models([f"one={world / 'one'}"])))
    (row,) = [row for row in report.rows if row.metric == "win_rate"]
    assert row.n == 8 and 0 <= row.value <= 100
    outputs = json.loads((tmp_path / "out" / "alpaca_eval" / "model_judgment" / "one" / "model_outputs.json").read_text())
    assert [each["instruction"] for each in outputs] == [each["instruction"] for each in reference]


def test_options_reach_every_judge(tmp_path):
    judge = Options(max_calls=3, score_parser="fastchat").judge(JudgeSpec(model="m", base_url="http://x/v1", max_cost=None))
    assert (judge.max_calls, judge.score_parser, judge.max_cost) == (3, "fastchat", None)


def test_what_is_prepared_is_what_runs_with_models_that_come_later(world, tmp_path):
    """As a recipe's suite, whose models are trained in between: its files are not read again."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "w1 w2", "sentence_bad": "w2 w1"}\n' * 3)
    benchmarks = {"p": {"type": "minimal_pairs", "path": str(pairs)}}
    text = yaml.safe_dump({"name": "s", "output_dir": str(tmp_path / "out"), "benchmarks": benchmarks})
    prepared = suites.prepare(load_suite_text(text, "s", need_models=False), Options())
    pairs.unlink()
    models = {name: SuiteModelSpec(path=str(world / name)) for name in ("one", "two")}
    report = suites.run_prepared(prepared.with_models(models))
    assert {(row.model, row.n) for row in report.rows if row.metric == "accuracy"} == {("one", 3), ("two", 3)}
    assert prepared.models == {}
    with pytest.raises(UserError, match=r"models\.no: no model could be found"):
        prepared.with_models({"no": SuiteModelSpec(path=str(tmp_path / "out"))})


def test_a_damaged_result_is_told(world, tmp_path):
    text, models = (world / "suite.yaml").read_text(), parse_models([f"one={world / 'one'}"])
    suite = load_suite_text(text, "s", models, [f"output_dir={tmp_path}", "benchmarks.general.generate=false"])
    run_suite(suite)
    (tmp_path / "quiz" / "results" / "one.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run_suite(suite)
