"""What the package imports is what it declares: an import that another package happens to bring is no promise."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# of a module that need not be installed; pydantic asks for one version of pydantic_core
DISTRIBUTIONS = {"lm_eval": "lm-eval", "deepspeed": "deepspeed", "pydantic_core": "pydantic"}
# torch's CUDA build brings triton; liger_kernel is one contestant of a benchmark, which says so where it is missing
UNDECLARED = {"daekit": {"triton"}, "benchmarks": {"triton", "liger_kernel"}, "examples": set()}


def names_of(requirements: Iterable[str]) -> set[str]:
    """The distributions of a list of requirements, in the spelling of the index."""
    return {normal(re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: str) -> dict[str, str]:
    """Module -> one file that imports it, of all that the standard library and the repository do not hold."""
    own = {"daekit", "tests", *(path.stem for path in (ROOT / folder).glob("*.py"))}
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in (name.partition(".")[0] for name in names):
                if name not in own and name not in sys.stdlib_module_names:
                    found.setdefault(name, str(path.relative_to(ROOT)))
    return found


def distribution(module: str) -> str:
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    return normal(importlib.metadata.packages_distributions().get(module, [module])[0])


CORE = names_of(PROJECT["dependencies"])
EXTRAS = {name: names_of(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


@pytest.mark.parametrize("folder", UNDECLARED)
def test_what_is_imported_is_declared(folder: str) -> None:
    declared = CORE.union(*EXTRAS.values())
    missing = {
        module: path
        for module, path in imported(folder).items()
        if distribution(module) not in declared and module not in UNDECLARED[folder]
    }
    assert missing == {}, "declare these in pyproject.toml"


def test_what_is_declared_is_imported() -> None:
    used = {distribution(module) for module in imported("daekit")}
    assert CORE - used == set(), "nothing imports these: take them out of pyproject.toml"


def test_the_tested_versions_name_every_dependency() -> None:
    pinned = names_of(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    assert CORE - pinned == set(), "pin these in constraints.txt"
