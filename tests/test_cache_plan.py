"""What the planner says of caches: no teacher in memory, and the bytes that are then on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from daekit.planning import format_plan, plan_json, plan_recipe
from daekit.recipe import load_recipe_text
from daekit.teachers import CachedTeacher, write_cache
from tests.helpers.batches import make_rows
from tests.helpers.cache_cases import V, model_teacher
from tests.helpers.planning import CPU, RECIPE, parts, plan

CONFIG = "config: {model_type: mistral, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4}"


def test_a_cached_teacher_takes_no_memory_in_training() -> None:
    live, cached = parts(phase="the loss"), parts("stages.kd.teacher.cache=hidden", phase="the loss")
    assert live["teacher weights"] > 0 and not cached.get("teacher weights")
    live, cached = (parts(*how, stage="dae", phase="the loss") for how in ((), ("stages.dae.reference={cache: hidden}",)))
    assert live["reference weights"] > 0 and not cached.get("reference weights")


@pytest.mark.parametrize(("cache", "keep"), [("hidden", {}), ("{keep: top_k, k: 12}", {"keep": "top_k", "k": 12})])
def test_bytes_on_the_disk_are_as_planned_within_two_percent(cache: str, keep: dict[str, object], tmp_path: Path) -> None:
    rows = make_rows(3, 60, 60)
    write_cache(model_teacher(), rows, tmp_path, **keep)  # type: ignore[arg-type]
    store = CachedTeacher(tmp_path).store
    (planned,) = plan(f"stages.kd.teacher={{{CONFIG}, dtype: float32, cache: {cache}}}").caches
    shards = sum(shard.bytes for shard in store.shards)
    keys = 24 * len(rows)  # of rows of a dozen tokens; of rows of a hundred they are 0.1%
    assert shards - keys == pytest.approx(planned.token_bytes * store.tokens, rel=0.02)
    heads = sum(each.numel() * each.element_size() for each in store.heads().values()) if not keep else 0
    assert heads == (V * 48 * torch.float32.itemsize if not keep else 0)


def test_the_plan_names_each_cache_once() -> None:
    ensemble = f"{{ensemble: [{{model: {{{CONFIG}}}, weight: 0.5}}, {{model: {{{CONFIG}}}, weight: 0.5}}], cache: hidden}}"
    overrides = [
        f"stages.kd.teacher={ensemble}",
        "stages.dae.reference={cache: sampled}",
        "stages.dae.teachers.ecommerce=labels",
    ]
    whole = plan_recipe(load_recipe_text(RECIPE, "planned.yaml", overrides), CPU)
    text, (kd, dae) = format_plan(whole), plan_json(whole)["stages"].values()
    assert kd["caches"]["teacher"]["bytes_per_loss_token"] == 2 * 48 * 4
    assert dae["caches"].keys() == {"reference"} and dae["caches"]["reference"]["heads"] == 0
    assert not any("weights" in part for part in dae["parts"] if "student" not in part)
    assert text.count("read from a cache") == 2
