"""Two processes train as one does on the double batch: real DDP over gloo on the CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from daekit.recipe import load_recipe
from daekit.runtime.run import run_recipe
from tests.helpers.ddp_run import CASES, ENVIRONMENT, LAUNCHER, RECIPE, SAME, TOLD, compare, rows, trainer_of
from tests.helpers.trainer_world import relative


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    compare(
        [
            "dae-on-policy-lora-reference",
            "kd-normalize-rows",
            "dae-one-domain-per-rank",
            "dae-inside-checkpointing-one-domain-per-rank",
        ],
        tmp_path,
    )


def test_a_recipe_runs_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    recipes = {}
    for world in (1, 2):
        text = RECIPE.replace("OUT", str(tmp_path / str(world))).replace("size: 4", f"size: {4 // world}")
        recipes[world] = tmp_path / f"{world}.yaml"
        recipes[world].write_text(text)
    subprocess.run([*LAUNCHER, "-m", "daekit", "train", str(recipes[2])], check=True, env=ENVIRONMENT, capture_output=True)
    run_recipe(load_recipe(recipes[1]))
    one, two = (load_file(tmp_path / world / "stages/aligned/model/model.safetensors") for world in ("1", "2"))
    assert all(relative(two[name], tensor) < SAME for name, tensor in one.items())
    assert (tmp_path / "2" / "report" / "report.json").is_file()


@pytest.mark.slow
def test_two_ranks_equal_one_where_teachers_are_told_more(tmp_path: Path) -> None:
    """Padded and packed, some rows with a prompt of their own length and some without."""
    compare(TOLD, tmp_path)
    packs = trainer_of("kd-told-packed", tmp_path, 1).train_dataset
    assert len(packs) == 16 and all(len(lengths) == 2 for lengths in packs["seq_lengths"])
    assert {len(row["teacher_prompt_ids"]) for row in rows("kd-told")} == {0, 4, 8}


@pytest.mark.slow
def test_two_ranks_equal_one_in_every_case(tmp_path: Path) -> None:
    compare(CASES, tmp_path)
