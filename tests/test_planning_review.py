"""What a plan must not get wrong: families without grouped attention, engines, devices that are one, the order of advice."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from daekit.errors import UserError
from daekit.planning import announcement, meta_model
from daekit.planning.advice import Change, changes, cheapest
from daekit.planning.machine import Machine, this_machine
from daekit.planning.memory import GRADIENTS, WEIGHTS
from daekit.planning.plan import Plan, Planner, plan_recipe
from daekit.recipe import load_recipe_text
from tests.helpers.planning import CPU, GPU, PATH, RECIPE, parts, plan

TWO = dataclasses.replace(GPU, count=2, engine="fsdp2")
QLORA = ("stages.kd.student={path: Qwen/Qwen2.5-0.5B, quantization: 4bit}", "stages.kd.lora.r=4")


def advised(memory: int, *overrides: str, machine: Machine = GPU) -> Any:
    def reload(more: Sequence[str]) -> Any:
        return load_recipe_text(RECIPE, "planned.yaml", [*overrides, *more])

    return plan_recipe(reload([]), dataclasses.replace(machine, memory=memory), reload, only=["kd"]).stages[0]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox"])
def test_families_without_groups_of_heads_are_planned(kind: str) -> None:
    config = "stages.kd.student.config={model_type: %s, num_hidden_layers: 2}" % kind  # noqa: UP031
    assert plan(config).memory.parts[WEIGHTS] > 10**6
    losses = ("stages.kd.loss.hidden_weight=1", config)
    assert parts(*losses, phase="the loss") != parts(config, phase="the loss")


def test_layers_that_are_not_found_are_said_to_be_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(model: Any) -> Any:
        raise UserError("no layers")

    with pytest.raises(UserError, match="a phi3 model cannot be built from its config"):
        plan("stages.kd.student.config={model_type: phi3, vocab_size: 100, pad_token_id: 500}")
    monkeypatch.setattr(meta_model, "decoder_layers", lost)
    with pytest.raises(UserError, match="LlamaForCausalLM: its layers could not be found, so its memory cannot be planned"):
        Planner(CPU).stage(load_recipe_text(RECIPE, "planned.yaml"), "kd")


def test_a_mistake_of_the_planner_stops_no_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> Plan:
        raise AttributeError("no such field")

    monkeypatch.setattr(announcement, "plan_recipe", broken)
    announcement.announce(load_recipe_text(RECIPE, "planned.yaml"), lambda more: load_recipe_text(RECIPE, "planned.yaml"))
    assert "[kd] no plan of its memory: no such field" in capsys.readouterr().out


@pytest.mark.parametrize("domain", ["reference", "teacher"])
def test_a_domain_of_any_name_keeps_its_teacher(domain: str) -> None:
    teachers = "stages.dae.teachers={%s: {config: {model_type: llama, num_hidden_layers: 9}}}"
    renamed, usual = (
        plan(teachers % name, "sources.shop.domain=" + name, "stages.dae.reference=stage:kd", stage="dae", machine=GPU)
        for name in (domain, "shop")
    )
    found = {part.replace(f"teacher {domain}", "teacher shop"): size for part, size in renamed.memory.parts.items()}
    assert found == usual.memory.parts and renamed.static == usual.static
    assert found["teacher shop weights"] > found["reference weights"] > 0


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_student_in_8_bits_is_not_split(engine: Any) -> None:
    with pytest.raises(UserError, match=f"student.quantization=8bit: {engine} cannot split weights of 8 bits"):
        plan(*QLORA, "stages.kd.student.quantization=8bit", machine=dataclasses.replace(TWO, engine=engine))
    one, two = (plan(*QLORA, machine=dataclasses.replace(GPU, count=n, engine=e)) for n, e in ((1, "none"), (2, "zero2")))
    assert one.memory.parts[WEIGHTS] == two.memory.parts[WEIGHTS]


def test_fsdp2_splits_four_bits_but_not_their_scales() -> None:
    one, two = (plan(*QLORA, machine=machine).memory.parts for machine in (GPU, dataclasses.replace(TWO, engine="fsdp2")))
    assert 0.5 < two[WEIGHTS] / one[WEIGHTS] < 0.52
    packed = "stages.kd.teacher={path: Qwen/Qwen2.5-0.5B, quantization: 4bit%s}"
    split, whole = (plan(*QLORA, packed % more, machine=TWO).memory.parts["teacher weights"] for more in ("", ", whole: true"))
    assert 0.5 < split / whole < 0.52


def test_fsdp2_keeps_whole_gradients_while_micro_batches_accumulate() -> None:
    """Transformers' loop reduces only after the last micro-batch (``no_sync``); until then each device has them whole."""
    more = "stages.kd.trainer.gradient_accumulation_steps=4"
    once, often = (parts(*each, machine=TWO, phase="the loss") for each in ((), (more,)))
    assert GRADIENTS not in once
    values = once[WEIGHTS] * 2 // 4
    assert often[GRADIENTS] == pytest.approx(2 * values, rel=0.01)  # bfloat16, of all weights
    assert parts(more, machine=dataclasses.replace(TWO, engine="zero2"), phase="the loss")[GRADIENTS] == 2 * values


@pytest.mark.parametrize(
    ("placement", "machine", "there", "may_move"),
    [
        ("device_map: cuda:1", GPU, False, False),
        ("device_map: cpu", GPU, False, False),
        ("device_map: cuda:0", GPU, True, False),
        ("device_map: '0'", GPU, True, False),
        ("device_map: balanced", GPU, True, True),
        ("device_map: auto", GPU, True, True),
        ("device_map: {model: cuda:1, lm_head: cuda:1}", GPU, False, False),
        ("device_map: {model: cuda:0, lm_head: cuda:1}", GPU, True, True),
        ("device_map: cpu", CPU, True, False),
        ("offload: true", CPU, True, False),
    ],
)
def test_a_teacher_takes_memory_where_it_lies(placement: str, machine: Machine, there: bool, may_move: bool) -> None:
    teacher = "stages.kd.teacher={path: Qwen/Qwen2.5-0.5B, dtype: bfloat16%s}"
    plain, placed = plan(teacher % "", machine=machine), plan(teacher % f", {placement}", machine=machine)
    weights = plain.memory.parts["teacher weights"]
    assert placed.memory.parts.get("teacher weights", 0) == (weights if there else 0)
    assert plain.static - placed.static == (0 if there and not may_move else weights), "a run is stopped for what is sure"


def test_a_run_that_stays_on_the_cpu_is_planned_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 10**9, 8 * 10**9) if device == 0 else 1 / 0)
    assert this_machine() == Machine(7 * 10**9)
    assert not this_machine(cpu=True).gpu
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_machine() == Machine(7 * 10**9, count=4, engine="ddp")


def test_what_trains_other_weights_is_advised_last() -> None:
    student = "stages.kd.student={path: Qwen/Qwen2.5-0.5B, dtype: float32}"
    teacher = "stages.kd.teacher={path: Qwen/Qwen2.5-1.5B, dtype: float32}"
    lora = plan(student, teacher, "stages.kd.lora.r=16", machine=GPU).memory.total
    whole = plan(student, teacher, machine=GPU).memory.total
    assert lora < whole
    found = advised(lora, student, teacher)
    assert {"LoRA", "QLoRA"}.isdisjoint(change.what for change in found.changes)
    overrides = [override for change in found.changes for override in change.overrides]
    assert plan(student, teacher, *overrides, machine=GPU).memory.total <= lora


def test_the_fewest_changes_are_taken() -> None:
    """Against all subsets, on made-up savings."""
    options = [Change(name, (name,)) for name in "abcd"]
    saves = {"a": 1, "b": 2, "c": 4, "d": 8}
    for wanted in range(1, 16):
        chosen = cheapest(options, lambda names, wanted=wanted: sum(saves[n] for n in names) >= wanted)  # type: ignore[misc]
        names = "".join(change.what for change in chosen)
        assert sum(saves[n] for n in names) >= wanted
        assert all(sum(saves[n] for n in names if n != left) < wanted for left in names), "one of them is not needed"
        singles = [n for n in "abcd" if saves[n] >= wanted]
        assert names == singles[0] if singles else len(names) > 1
    assert cheapest(options, lambda names: False) == ()


def test_as_many_devices_as_there_are_may_be_enough() -> None:
    student = PATH.format("kd")
    fsdp2 = plan(student, machine=TWO).memory.total
    assert fsdp2 < plan(student, machine=dataclasses.replace(TWO, engine="ddp")).memory.total
    assert advised(fsdp2, student, machine=dataclasses.replace(TWO, engine="ddp")).shards == 2
    assert advised(fsdp2, student).shards == 2


def test_every_change_may_be_laid_over_the_recipe() -> None:
    base = [PATH.format("kd"), "stages.kd.teacher=Qwen/Qwen2.5-1.5B", "stages.kd.trainer.gradient_accumulation_steps=2"]
    recipe = load_recipe_text(RECIPE, "planned.yaml", base)
    options = changes(recipe.stages["kd"], "kd", Planner(GPU).stage(recipe, "kd").training, gpu=True)
    before = plan(*base, machine=GPU).memory.total
    assert {option.what for option in options} >= {"teachers in 4 bits", "teachers in host memory", "LoRA", "QLoRA"}
    for option in options:
        assert plan(*base, *option.overrides, machine=GPU).memory.total < before, option.what


def test_libraries_say_nothing_of_their_own() -> None:
    recipe = load_recipe_text(RECIPE, "planned.yaml", QLORA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Planner(GPU).stage(recipe, "kd")
