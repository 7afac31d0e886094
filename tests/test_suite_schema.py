"""Loading a suite: typed, every error at once, models from the command line, the suites that ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.recipe.dump import to_yaml
from daekit.recipe.load import load_suite, load_suite_text, parse_models
from daekit.recipe.suite import BENCHMARKS, MinimalPairsSpec, MTBenchSpec, SuiteModelSpec

SUITES = sorted((Path(__file__).parent.parent / "eval" / "suites").glob("*.yaml"))
BASE = """\
name: base
output_dir: runs/base
benchmarks:
  pairs: {type: minimal_pairs, path: .}
  text: {type: perplexity, texts: {novels: ., news: .}}
models:
  one: some/model
"""


def errors(text: str, *overrides: str, models: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_suite_text(text, "test.yaml", models, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]] or [str(caught.value)]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_shipped_suite_loads_but_for_the_paths_of_its_data(path: Path, tmp_path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("What", "Needs", "Run", "Time", f"eval/suites/{path.name}"):
        assert word in header
    assert f"({'suites/' + path.name})" in (path.parent.parent / "README.md").read_text(encoding="utf-8")
    overrides = []
    try:
        load_suite(path, {"mine": "some/model"})
    except UserError as error:  # the message says what to write on the command line
        for each in error.details:
            assert "does not exist; correct it, or override this key" in each.reason
            overrides.append(f"{each.key}={tmp_path}")
    suite = load_suite(path, {"mine": "some/model"}, overrides)
    assert suite.name == path.stem
    assert list(suite.models) == ["mine"]


def test_suites_for_all_types_ship() -> None:
    assert len(SUITES) >= 5
    text = "".join(path.read_text() for path in SUITES)
    assert all(f"type: {name}" in text for name in BENCHMARKS)


def test_benchmarks_are_typed_by_their_type() -> None:
    suite = load_suite_text(BASE, "test.yaml", None, ["benchmarks.pairs.limit=3", "models.one.dtype=bfloat16"])
    assert suite.benchmarks["pairs"] == MinimalPairsSpec(path=".", limit=3)
    assert suite.models["one"] == SuiteModelSpec(path="some/model", dtype="bfloat16")


def test_a_suite_written_out_is_the_suite() -> None:
    more = "  mt: {type: mt_bench, path: ., judge: {model: g, base_url: http://x/v1}, chat_template_kwargs: {a: {b: no}}}\n"
    suite = load_suite_text(BASE.replace("models:", more + "models:"), "test.yaml", None)
    assert isinstance(suite.benchmarks["mt"], MTBenchSpec)
    assert load_suite_text(to_yaml(suite), "again.yaml") == suite


def test_all_errors_at_once() -> None:
    found = errors(
        BASE,
        "benchmarks.pairs.pat=x",
        "benchmarks.text.stride=4096",
        "benchmarks.more={type: minimal_pair, path: .}",
        "benchmarks={}",
        "baseline=tow",
    )
    assert any("benchmarks" in line for line in found)
    found = errors(BASE, "benchmarks.pairs.pat=x", "benchmarks.text.stride=4096", "baseline=ome", "bootstrap=0")
    assert len(found) == 4
    assert "did you mean 'path'?" in found[1] or any("did you mean 'path'?" in line for line in found)
    assert any("did you mean 'one'?" in line for line in found)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("benchmarks.pairs.type=minimal_pair", "did you mean 'minimal_pairs'?"),
        ("benchmarks.pairs={path: .}", "pairs.type: this required key is missing: it must be one of minimal_pairs"),
        ("benchmarks.pears.limit=3", "did you mean 'pairs'?"),
        ("models.on.dtype=float32", "models has no 'on'; did you mean 'one'?"),
        ("benchmarks.pairs.path=nowhere", "'nowhere' does not exist"),
        ("benchmarks.pairs.limit=0", "must be greater than 0"),
        (
            "benchmarks.rows={type: rows, domain: shop, path: 'builtin:shopp'}",
            "is not an embedded corpus (skills, chat and shop)",
        ),
        ("benchmarks.text.stride=1024", "must be less than window"),
        ("benchmarks.text.texts={}", "texts: must not be empty"),
        ("benchmarks.text.texts={pairs: .}", "is also that of 'pairs'"),
        ("models.one=./nowhere", "does not exist"),
        ("models.one={url: 'http://x/v1'}", "say which model of the endpoint"),
        ("models.one={path: a, url: 'http://x/v1'}", "exactly one of path and url"),
        ("models.one='http://x/v1#m'", "likelihood of given text, which pairs and text need"),
        ("models={}", "no model to measure"),
        ("judge={model: m}", "name exactly one of base_url"),
        ("judge={model: m, base_url: 'http://h:port/v1'}", "judge.base_url: is no URL"),
        ("models.one='http://h:port/v1#m'", "models.one: its url is no URL"),
        ("benchmarks.mt={type: mt_bench, path: ., temperature: -0.5}", "temperature: -0.5 must not be negative"),
    ],
)
def test_what_is_wrong_is_said(override: str, says: str) -> None:
    assert says in "\n".join(errors(BASE, override))


def test_a_reference_is_a_path_and_no_name_of_a_model() -> None:
    rows = BASE.replace("models:", "  rows: {type: rows, path: ., reference: one}\nmodels:\n  two: a/b")
    assert "'one' is a name of `models`; write the path" in "\n".join(errors(rows))
    assert load_suite_text(rows, "t", None, ["benchmarks.rows.reference=a/one"])


def test_pairwise_needs_its_baseline() -> None:
    mt = BASE.replace("models:", "  mt: {type: mt_bench, path: ., mode: pairwise-baseline}\nmodels:\n  two: a/b")
    assert "needs the model that the others" in "\n".join(errors(mt))
    assert "did you mean 'one'?" in "\n".join(errors(mt, "benchmarks.mt.baseline=ome"))
    assert "has no baseline" in "\n".join(errors(mt, "benchmarks.mt.mode=single", "benchmarks.mt.baseline=one"))
    assert load_suite_text(mt, "t", None, ["benchmarks.mt.baseline=one"])


def test_models_of_the_command_line(tmp_path: Path) -> None:
    plus = tmp_path / "a+b"
    plus.mkdir()
    found = parse_models(["x=some/model", "runs/dae/model", "http://h:1/v1#served/name", "base+my/adapter", f"p={plus}"])
    assert list(found) == ["x", "model", "name", "adapter", "p"]
    assert SuiteModelSpec.model_validate(found["name"]) == SuiteModelSpec(url="http://h:1/v1", served_model="served/name")
    assert SuiteModelSpec.model_validate(found["adapter"]) == SuiteModelSpec(path="base", adapter="my/adapter")
    assert SuiteModelSpec.model_validate(found["p"]) == SuiteModelSpec(path=str(plus))
    suite = load_suite_text(BASE, "test.yaml", {"two": "c/d"}, ["models.two.revision=main"])
    assert list(suite.models) == ["one", "two"] and suite.models["two"].revision == "main"
    for wrong in (["a/x", "b/x"], ["x="], [""]):
        with pytest.raises(UserError):
            parse_models(wrong)


def test_suites_import_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, daekit.recipe.load, daekit.cli; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
