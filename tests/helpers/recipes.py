"""A small recipe that is right, and what loading a changed one says."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.recipe import Recipe, load_recipe_text

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(path for folder in ("recipes", "recipes/paper") for path in (ROOT / folder).glob("*.yaml"))

BASE = """\
name: base
output_dir: runs/base
sources:
  shop: {domain: ecommerce, path: builtin:shop, validation: builtin:shop}
  general: {domain: general, path: builtin:chat}
stages:
  kd:
    type: kd
    student: some/student
    teacher: some/teacher
    data: [general]
  dae:
    type: dae
    teachers: {ecommerce: some/expert}
    data: {shop: 0.25, general: 0.75}
"""


def load(text: str, *overrides: str) -> Recipe:
    return load_recipe_text(textwrap.dedent(text), "test.yaml", overrides)


def errors(text: str, *overrides: str) -> list[str]:
    """The lines of the one error that loading raises."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]] or [str(caught.value)]
