"""Every command that a README shows is one that the program understands, and names files that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from daekit.cli import parse

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "eval/README.md", "recipes/README.md"]
SHIPPED = ("recipes/", "eval/suites/")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command line of the pages' shell blocks that calls daekit."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "daekit" in words:
                    found.append((page, words))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_command_of_a_readme_is_understood(page: str, words: list[str]) -> None:
    parse(words[words.index("daekit") + 1 :])
    for word in words:
        if word.startswith(SHIPPED):
            assert (ROOT / word).is_file(), word


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in commands()} >= {"README.md", "eval/README.md"}
