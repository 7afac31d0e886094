"""What the pages show is what the program takes: commands, files, links, Python names and recipe keys."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import daekit
from daekit.cli import parse
from daekit.recipe import load_recipe_text

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "*/README.md", "benchmarks/results/README.md")
    for path in ROOT.glob(pattern)
)
SHIPPED = ("recipes/", "eval/suites/", "benchmarks/", "examples/")
MADE = re.compile(r"benchmarks/results/.*\.json|eval/results/.*")  # what a command writes


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the pages' fenced blocks of a language."""
    fence = re.compile(rf"^ *```(?:{language})\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    return [(page, text) for page in PAGES for text in fence.findall((ROOT / page).read_text(encoding="utf-8"))]


def lines_of_shell() -> list[tuple[str, list[str]]]:
    """(page, words) of every command line of the pages."""
    return [
        (page, words)
        for page, block in blocks("bash|sh")
        for line in block.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words after the program's name) of every command line that calls daekit."""
    return [(page, words[words.index("daekit") + 1 :]) for page, words in lines_of_shell() if "daekit" in words]


def shown(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)[:60]


@pytest.mark.parametrize(("page", "words"), commands(), ids=shown)
def test_a_command_is_understood(page: str, words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(("page", "words"), lines_of_shell(), ids=shown)
def test_a_command_names_files_and_targets_that_are_there(page: str, words: list[str]) -> None:
    for word in words:
        if word.startswith(SHIPPED) and not MADE.fullmatch(word):
            assert (ROOT / word).is_file(), f"{page}: {word}"
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{page}: make {words[1]}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in anchors, f"{page}: {target}"


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=shown)
def test_python_has_syntax_and_names_that_are_there(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "daekit":
            assert {alias.name for alias in node.names} <= set(daekit.__all__), page


BASE = """
name: shown
output_dir: out
sources: {shop: {domain: shop, path: rows.jsonl, holdout: 5}, general: {domain: general, path: rows.jsonl, holdout: 5}}
stages:
  teacher: {type: sft, student: my/teacher, data: [general]}
  expert: {type: sft, student: my/teacher, lora: {r: 4}, data: [shop]}
  kd: {type: kd, student: my/student, teacher: "stage:teacher", data: [general]}
  dae: {type: dae, teachers: {shop: "stage:expert"}, data: [shop, general]}
evaluation: {models: [kd, dae], baseline: kd}
"""
PLACES = {
    "sources": (),
    "stages": (),
    "evaluation": (),
    "trainer": ("stages", "kd"),
    "teacher": ("stages", "kd"),
    "student": ("stages", "kd"),
    "teachers": ("stages", "dae"),
    "reference": ("stages", "dae"),
    "data": ("stages", "dae"),
    "judge": None,  # of a suite
}


def fragments() -> list[tuple[str, str]]:
    """(page, text) of every top-level key in the pages' YAML."""
    return [
        (page, part)
        for page, block in blocks("yaml")
        for part in re.findall(r"^\w[\w-]*:.*\n(?:(?:[ #].*)?\n)*", block, re.MULTILINE)
    ]


@pytest.mark.parametrize(("page", "text"), fragments(), ids=shown)
def test_a_recipe_may_say_what_a_page_shows(page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    Path("eval").symlink_to(ROOT / "eval")
    Path("blimp/data").mkdir(parents=True)  # what the suite of a page reads
    ((key, value),) = yaml.safe_load(text).items()
    where = PLACES[key]
    if where is None:
        return
    recipe = yaml.safe_load(BASE)
    inside = recipe
    for name in where:
        inside = inside[name]
    if key in ("sources", "stages"):
        recipe.pop("evaluation")
    if key == "sources":
        recipe["stages"] = {"sft": {"type": "sft", "student": "my/student", "data": list(value)}}
    if key == "teachers":  # the rows of every domain that the page names
        recipe["sources"] |= {domain: {"domain": domain, "path": "rows.jsonl"} for domain in value}
        inside["data"] = [*value, "general"]
    inside[key] = value
    loaded = load_recipe_text(yaml.safe_dump(recipe, sort_keys=False), page)
    if key == "student" and "from" in value:
        assert loaded.stages["kd"].student is not None and loaded.stages["kd"].student.init is not None


def test_the_pages_show_something() -> None:
    assert {"README.md", "docs/memory.md", "eval/README.md"} <= {page for page, _ in commands()}
    assert len(blocks("python")) >= 1 and len(fragments()) >= 15
