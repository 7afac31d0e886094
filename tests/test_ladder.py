"""The house rules of the package, read off its syntax trees: who may import whom, and what nobody may write."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import daekit

PACKAGE = Path(daekit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# a room imports from lower steps only; rooms of one step never meet
LADDER = [
    {"environment", "errors", "progress"},
    {"files"},
    {"recipe", "protocol", "metrics"},
    {"models"},
    {"generation"},
    {"data", "teachers", "losses", "report"},
    {"trainers", "evaluation", "students"},
    {"runtime", "planning"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
STEP = {room: step for step, rooms in enumerate(LADDER) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 350, 70


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names of everything imported, at any depth of the file, relative imports resolved."""
    package = ["daekit", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def climbs(tree: ast.AST, path: Path) -> list[str]:
    """Imports of this package that go up the ladder or to a sibling."""
    own = room_of(path)
    targets = [name.split(".")[1] for name in imports(tree, path) if name.startswith("daekit.")]
    return [room for room in targets if room in STEP and room != own and STEP[room] >= STEP[own]]


def offences(tree: ast.AST, path: Path) -> list[str]:
    """What no file of the package may contain."""
    found = []
    for name in imports(tree, path):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve"):
            found.append(f"imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                found.append(f"{node.name}: more than {LONGEST_FUNCTION} lines")
            if room_of(path) == "losses" and node.args.kwarg:
                found.append(f"{node.name}: takes **{node.args.kwarg.arg}")
        elif isinstance(node, ast.Call):
            found += _call_offences(node)
    return found


def _call_offences(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    found = []
    if name == "torch.load" and keywords.get("weights_only") != "True":
        found.append(f"line {call.lineno}: torch.load without weights_only=True")
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load") and "Safe" not in keywords.get(
        "Loader", ""
    ):
        found.append(f"line {call.lineno}: {name} is not safe")
    if name in ("eval", "exec"):
        found.append(f"line {call.lineno}: {name}")
    if keywords.get("trust_remote_code") == "True":
        found.append(f"line {call.lineno}: trust_remote_code=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert room_of(path) in STEP, "a room that the ladder does not know"
    assert climbs(tree, path) == []
    assert offences(tree, path) == []
    assert len(text.splitlines()) <= LONGEST_FILE
    assert not [place for place in ("/work/", "/tmp/", "/home/", "/root/") if place in text]


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("recipe", "from daekit.protocol import Batch"),
        ("losses", "from daekit.teachers import ModelTeacher"),
        ("losses", "from daekit import teachers"),
        ("losses", "from ..teachers import ModelTeacher"),
        ("models", "def f():\n    import daekit.trainers.kd"),
        ("errors.py", "import daekit.protocol"),
        ("evaluation", "from daekit.runtime.run import run_recipe"),
    ],
)
def test_the_ladder_is_seen_to_be_climbed(room: str, line: str) -> None:
    path = PACKAGE / room if room.endswith(".py") else PACKAGE / room / "x.py"
    assert climbs(ast.parse(line), path)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "try:\n    f()\nexcept:\n    pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(stream)",
        "eval(text)",
        "load(path, trust_remote_code=True)",
        "def f(a, **kwargs): pass",
        "def f():\n" + "    x = 1\n" * 70,
    ],
)
def test_offences_are_seen(line: str) -> None:
    assert offences(ast.parse(line), PACKAGE / "losses" / "x.py")


@pytest.mark.parametrize(
    "line", ["import torch", "yaml.safe_load(s)", "torch.load(p, weights_only=True)", "def f(*args): pass"]
)
def test_what_is_allowed_is_no_offence(line: str) -> None:
    assert not offences(ast.parse(line), PACKAGE / "losses" / "x.py")
    assert not climbs(ast.parse("from daekit.models import heads\nfrom daekit.losses import x"), PACKAGE / "losses" / "x.py")


def test_recipes_import_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "trl", "datasets")
    code = f"import sys, daekit, daekit.recipe; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)_?")


def shape_letters(tree: ast.AST) -> set[str]:
    """The letters of the shape suffixes of all names in a file (``hidden_NH``: N, H)."""
    names = [getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None) for node in ast.walk(tree)]
    return {letter for name in names if name and (m := SUFFIX.fullmatch(name)) for letter in m[1] if letter.isalpha()}


def test_the_shape_legend_has_every_letter_that_names_use() -> None:
    import daekit.protocol

    legend = daekit.protocol.__doc__.partition("====  =")[2].rpartition("====  =")[0]
    known = {letter for line in legend.splitlines() for letter in re.findall(r"(?:^|[,;] )([A-Z])\b", line)}
    used = {path.name: shape_letters(ast.parse(path.read_text())) for path in FILES}
    assert {name: letters - known for name, letters in used.items() if letters - known} == {}
    assert "Z" not in known and shape_letters(ast.parse("def f(x_NZ): y_Q = x_NZ.z_R1")) == {"N", "Z", "Q", "R"}
