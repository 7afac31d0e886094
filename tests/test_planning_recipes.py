"""Every shipped recipe can be planned offline, and its header states what the plan says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from daekit.cli import parse
from daekit.planning.machine import Machine, machine_of
from daekit.planning.plan import plan_recipe
from daekit.planning.show import gigabytes
from daekit.recipe import load_recipe
from tests.helpers.planning import RECIPES, ROOT

PLAN = re.compile(r"^# Plan +daekit (plan .*)$", re.MULTILINE)
PLANNED = re.compile(r"^# Planned +(.*)$", re.MULTILINE)


def machine_and_figures(path: Path) -> tuple[Machine, dict[str, str]]:
    """What the header of a recipe says: the machine, and the planned peak of each stage."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    (command,), (stated,) = PLAN.findall(header), PLANNED.findall(header)
    options = parse(shlex.split(command))
    assert (ROOT / options.recipe).samefile(path)
    figures = dict(part.split(" ", 1) for part in stated.split(", "))
    return machine_of(options.gpu, options.cpu, options.gpus, options.engine), figures


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_states_the_plan(path: Path) -> None:
    machine, figures = machine_and_figures(path)
    plan = plan_recipe(load_recipe(path), machine)
    assert {stage.name: gigabytes(stage.memory.total) for stage in plan.stages} == figures
    assert all(stage.fits for stage in plan.stages), "a recipe that does not fit the machine of its header"
