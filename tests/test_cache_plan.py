"""What the planner says of caches: no teacher in memory, and the bytes that are then on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from daekit.planning.plan import plan_recipe
from daekit.planning.show import format_plan, plan_json
from daekit.recipe import load_recipe_text
from daekit.runtime.data import stage_rows
from daekit.runtime.run import cache_teachers
from daekit.teachers import CachedTeacher, write_cache
from tests.helpers import tiny
from tests.helpers.batches import make_rows
from tests.helpers.cache_cases import V, model_teacher
from tests.helpers.cache_world import build_world, recipe_text
from tests.helpers.planning import CPU, RECIPE, parts, plan

CONFIG = (
    "config: {model_type: mistral, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4}"
)


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


def test_drawn_tokens_are_a_range_until_some_lie_there(tmp_path: Path) -> None:
    """How many of the draws differ, only the teacher's own distributions tell."""
    rows, path = make_rows(3, 60, 60), tmp_path / "drawn"
    keep = f"stages.kd.teacher={{{CONFIG}, dtype: float32, cache: {{keep: sampled, draws: 9, path: {path}}}}}"
    mixture = "stages.kd.data={sources: {text: 1}, rows: 10}"

    def planned() -> tuple[Any, str]:
        whole = plan_recipe(load_recipe_text(RECIPE, "planned.yaml", [keep, mixture]), CPU)
        return whole.stages[0].caches[0], format_plan(whole)

    before, text = planned()
    assert before.drawn == (5, 37) and "between 5 and 37" in text
    write_cache(model_teacher(), rows, path, keep="sampled", draws=9)
    store = CachedTeacher(path).store
    after, text = planned()
    assert before.drawn[0] < after.token_bytes < before.drawn[1] and after.drawn is None and "between" not in text
    values = sum(shard.bytes for shard in store.shards) - 32 * len(rows)
    assert after.token_bytes == pytest.approx(values / store.tokens, rel=0.02)
    other = plan(keep.replace("draws: 9", "draws: 8")).caches[0]
    assert other.drawn == (5, 33)  # those of other draws say nothing


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


def test_rows_are_counted_as_they_are_kept(tmp_path: Path) -> None:
    """Of each teacher: its domain's rows, those for validation too, equal ones once; bytes within 2%."""
    world = build_world(tmp_path)
    rows = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in tiny.rows(150, seed=7)]
    (world / "general.jsonl").write_text("\n".join(rows + rows[:20]))
    forms = ("stages.dae.teachers.shop.cache={keep: top_k, k: 12}", "stages.dae.reference.cache={keep: sampled, draws: 1}")
    student = f"stages.dae.student={world / 'student'}"
    recipe = load_recipe_text(recipe_text(world, tmp_path / "run"), "cached.yaml", [student, *forms])
    kd, dae = plan_recipe(recipe, CPU, rows=stage_rows(recipe)).stages
    planned = dict(zip(("hidden", "top_k", "sampled"), (*kd.caches, *dae.caches), strict=True))
    cache_teachers(recipe)
    stores = {store.facts["keep"]: store for store in map(store_of, (tmp_path / "run" / "caches").iterdir())}
    assert stores.keys() == planned.keys()
    for keep, store in stores.items():
        cache = planned[keep]
        assert cache.counts is not None and cache.size is not None
        assert (cache.counts.rows, cache.counts.loss_tokens) == (len(store.index), store.tokens)
        heads = sum(each.numel() * each.element_size() for each in store.heads().values()) if cache.head_bytes else 0
        headers = 1024 * len(store.shards)
        assert sum(shard.bytes for shard in store.shards) + heads == pytest.approx(cache.size, rel=0.02, abs=headers)


def store_of(folder: Path) -> Any:
    return CachedTeacher(folder).store


def test_rows_that_cannot_be_read_are_estimated_and_the_reason_is_said(tmp_path: Path) -> None:
    recipe = load_recipe_text(
        recipe_text(build_world(tmp_path), tmp_path / "run"),
        "cached.yaml",
        ["stages.kd.data={sources: {general: 1}, rows: 40}"],
    )
    (tmp_path / "general.jsonl").unlink()
    whole = plan_recipe(recipe, CPU, rows=stage_rows(recipe))
    kd, dae = (stage.caches[0] for stage in whole.stages)
    assert kd.counts is not None and (kd.counts.rows, kd.counts.loss_tokens) == (40, 40 * 1023)
    assert kd.size == kd.head_bytes + 40 * 1023 * kd.token_bytes + 40 * 24
    assert "general.jsonl does not exist" in kd.counts.estimated and "general.jsonl does not exist" in dae.unread
    assert dae.size is None and dae.operations is None
    text = format_plan(whole, tflops=1)
    assert "(at most: as if each of 40 rows had max_length tokens, for sources.general" in text
    assert "its size is not known: sources.general" in text


def test_making_takes_the_teacher_alone_and_its_operations() -> None:
    def making(form: str) -> Any:
        recipe = load_recipe_text(
            RECIPE, "planned.yaml", [f"stages.kd.teacher.cache={form}", "stages.kd.data={sources: {text: 1}, rows: 10}"]
        )
        return plan_recipe(recipe, CPU).stages[0].caches[0]

    hidden, top_k = making("hidden"), making("{keep: top_k, k: 12}")
    weights = plan().memory.parts["teacher weights"]
    assert hidden.making.parts["teacher weights"] == weights
    assert hidden.making.total < plan("stages.kd.student.config.num_hidden_layers=60").memory.total
    head = 2 * 10 * 63 * 96 * 500
    assert top_k.operations - hidden.operations == head
    tokens, layers = 10 * 64, 3
    resting = layers * 2 * 3 * 96 * 128  # a token is sent to two of four experts
    attention = layers * 64 * 96
    assert hidden.operations == pytest.approx(2 * tokens * (weights / 4 - 2 * 500 * 96 - resting + attention), rel=0.005)


def test_a_served_teacher_takes_nothing_here() -> None:
    served = "stages.kd.teacher={base_url: 'http://127.0.0.1:1/v1', model: large, %s}"
    live, cached = (plan(served % how) for how in ("k: 8", "cache: {keep: top_k, k: 8}"))
    assert not any("teacher" in part and "weights" in part for part in {**live.memory.parts, **cached.memory.parts})
    (cache,) = cached.caches
    assert cache.token_bytes == 5 * 8 + 4 and not cache.making.parts.get("teacher weights") and live.caches == ()
