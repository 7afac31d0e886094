"""The planner: its parts, what they depend on, what it advises, and that it agrees with runs that are measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daekit.cli import main
from daekit.errors import UserError
from daekit.planning import announcement
from daekit.planning.advice import largest_rows
from daekit.planning.generation import KEYS_AND_VALUES
from daekit.planning.machine import Machine, machine_of
from daekit.planning.memory import ACTIVATIONS, ADAPTERS, GATHERED, GRADIENTS, OPTIMIZER, OUTPUTS, WEIGHTS
from daekit.planning.plan import Planner, StagePlan, plan_recipe
from daekit.planning.show import format_plan, plan_json
from daekit.planning.training import DEFAULTS, optimizer_bytes
from daekit.recipe import load_recipe_text
from daekit.recipe.objective import ROLLOUT_BATCH
from daekit.trainers import DAEConfig
from tests.helpers.planning import CPU, GPU, PATH, RECIPE, ROOT, parts, plan


def test_parts_sum_to_the_total_and_the_peak_is_the_highest_phase() -> None:
    planner = Planner(CPU)
    memory = planner._memory(load_recipe_text(RECIPE, "planned.yaml"), "kd")
    phases = memory.phases()
    assert memory.peak().total == max(sum(phase.parts.values()) for phase in phases)
    assert len(phases) == 8
    for phase in phases:
        assert phase.total == sum(phase.parts.values())
        assert phase.parts[WEIGHTS] > 0 and phase.parts["teacher weights"] > 0


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("key", ["per_device_train_batch_size=4", "max_length=128"])
def test_twice_the_tokens_take_twice_the_activations(key: str, checkpointing: str) -> None:
    setting = f"stages.kd.trainer.gradient_checkpointing={checkpointing}"
    once = parts(setting, phase="the student runs")
    twice = parts(setting, f"stages.kd.trainer.{key}", phase="the student runs")
    assert twice[ACTIVATIONS] == pytest.approx(2 * once[ACTIVATIONS], rel=0.06 if "batch" in key else 0.2)
    assert twice[OUTPUTS] == 2 * once[OUTPUTS]
    assert all(twice[part] == once[part] for part in (WEIGHTS, OPTIMIZER, "teacher weights"))


def test_host_memory_while_loading() -> None:
    """FSDP2 and ZeRO-3: each rank has its part, and in hand a part of one layer (on a CPU more); elsewhere everything."""
    models = (PATH.format("kd"), "stages.kd.teacher={path: Qwen/Qwen2.5-0.5B, dtype: bfloat16}")

    def host(engine: Any, count: int, *more: str, gpu: bool = True) -> int:
        process = 10**9 if gpu else 500_000_000
        return plan(*models, *more, machine=Machine(80 * 10**9, gpu, count, engine)).host - count * process

    student = plan(*models, machine=GPU).memory.parts[WEIGHTS]  # in float32
    teacher = student // 2
    assert host("ddp", 4) == pytest.approx(4 * (student + teacher) + student, rel=1e-6)
    assert host("fsdp2", 4) < 0.1 * student  # and what has been read is on the GPUs
    on_cpus = host("fsdp2", 4, gpu=False)
    assert student + teacher < on_cpus < 2 * student + teacher
    assert host("zero3", 4) < 0.3 * student  # the embedding, a part of it on each rank
    # DeepSpeed's copy of the weights, its gradients and both states of AdamW are made before the first step
    assert host("zero3", 4, gpu=False) == pytest.approx(student + teacher + 4 * student, rel=0.01)
    sgd = host("zero3", 4, "stages.kd.trainer.optim=sgd", gpu=False)
    assert student + teacher + 2 * student <= sgd < host("zero3", 4, gpu=False) - student  # it has no states
    for whole in ("quantization: 4bit", "offload: true", "trust_remote_code: true"):
        read_whole = f"stages.kd.teacher={{path: Qwen/Qwen2.5-0.5B, {whole}}}"
        assert host("fsdp2", 8, read_whole) - host("fsdp2", 4, read_whole) > teacher  # on each of four more ranks
    text = format_plan(plan_recipe(load_recipe_text(RECIPE, "planned.yaml"), Machine(8 * 10**9, count=2, engine="fsdp2")))
    assert "host while loading" in text and "of a machine that runs all 2 processes" in text


def test_the_process_itself_takes_memory() -> None:
    """Five runs of the trainers measured 0.70 to 0.80 GB beyond their tensors; see ``planning/machine.py``."""
    assert parts(phase="the loss")["interpreter and libraries"] == pytest.approx(0.75e9, abs=0.05e9)
    assert parts(phase="the loss", machine=GPU)["CUDA context"] == 10**9
    assert plan().static < plan().memory.total - 0.7e9, "a run is not refused for an estimate"


def test_twice_the_layers_take_twice_what_the_layers_keep() -> None:
    def kept(layers: int) -> int:
        setting = ("stages.kd.trainer.gradient_checkpointing=false", f"stages.kd.student.config.num_hidden_layers={layers}")
        return parts(*setting, phase="the student runs")[ACTIVATIONS]

    assert kept(9) - kept(6) == kept(6) - kept(3) > 0


def test_checkpointing_and_accumulation() -> None:
    plain, again = (parts(f"stages.kd.trainer.gradient_checkpointing={on}", phase="the loss") for on in ("false", "true"))
    assert again[ACTIVATIONS] < 0.3 * plain[ACTIVATIONS]
    assert GRADIENTS not in plain  # they are made after the loss
    accumulated = parts("stages.kd.trainer.gradient_accumulation_steps=2", phase="the loss")
    assert accumulated[GRADIENTS] == accumulated[WEIGHTS]


def test_losses_inside_the_model_keep_queries_keys_and_hidden_states() -> None:
    relation = ("stages.kd.loss.attention_weight=1", "stages.kd.loss.attention_relation_heads=4")
    tokens, layers, four_bytes = 2 * 64, 6, 4
    base, attention = (parts(*more, phase="the loss")[OUTPUTS] for more in ((), relation))
    assert attention - base == tokens * layers * 2 * 96 * four_bytes
    hidden = parts("stages.kd.loss.hidden_weight=1", phase="the loss")[OUTPUTS]
    assert hidden - base == tokens * layers * 96 * four_bytes
    deeper = ("stages.kd.teacher.config.num_hidden_layers=8", "stages.kd.loss={hidden_weight: 1, hidden_layers: [[0, 7]]}")
    assert parts(*deeper, phase="the loss")[OUTPUTS] - base == tokens * 96 * four_bytes, "pairs reach below the student"


def test_lora_trains_the_adapter_alone() -> None:
    full, lora = (parts(PATH.format("kd"), *more, phase="the optimizer's step") for more in ((), ("stages.kd.lora.r=4",)))
    assert lora[WEIGHTS] == full[WEIGHTS]
    assert lora[OPTIMIZER] == 2 * lora[ADAPTERS] == 2 * lora[GRADIENTS]
    assert full[OPTIMIZER] == 2 * full[WEIGHTS]
    reference = parts(PATH.format("dae"), "stages.dae.lora.r=4", stage="dae", phase="the loss")
    assert reference[ADAPTERS] == 2 * lora[ADAPTERS], "the reference is a copy of the adapter"
    assert "reference weights" not in reference
    assert parts(PATH.format("dae"), stage="dae")["reference weights"] == full[WEIGHTS]


def test_the_optimizer_decides_its_states() -> None:
    planner = Planner(CPU)
    trained = list(planner._memory(load_recipe_text(RECIPE, "planned.yaml"), "kd").student.parameters())
    values = sum(p.values for p in trained)
    states = {
        name: optimizer_bytes(name, trained, gpu=True)[0]
        for name in ("adamw_torch", "adamw_8bit", "sgd", "adafactor", "paged_adamw_8bit", "lion_32bit")
    }
    assert states["adamw_torch"] == 8 * values
    assert states["lion_32bit"] == 4 * values
    assert 2 * values < states["adamw_8bit"] < 3 * values  # the embedding stays in 32 bits
    assert states["sgd"] == states["paged_adamw_8bit"] == 0
    assert 0 < states["adafactor"] < 0.1 * values
    with pytest.raises(UserError, match="optim='galore_adamw': the memory of its states is not known; known are adafactor"):
        optimizer_bytes("galore_adamw", trained, gpu=True)


@pytest.mark.parametrize(
    ("engine", "halved", "whole"),
    [
        ("zero3", {WEIGHTS, "teacher weights", GRADIENTS}, set()),
        ("fsdp2", {"teacher weights", OPTIMIZER, GRADIENTS, WEIGHTS}, set()),
        ("zero2", {GRADIENTS}, {WEIGHTS, "teacher weights"}),
        ("ddp", set(), {WEIGHTS, "teacher weights", GRADIENTS, OPTIMIZER}),
    ],
)
def test_two_devices_split_what_the_engine_splits(engine: Any, halved: set[str], whole: set[str]) -> None:
    one, two = (
        parts(machine=machine, phase="the optimizer's step")
        for machine in (GPU, dataclasses.replace(GPU, count=2, engine=engine))
    )
    for part in halved:
        assert two[part] == pytest.approx(one[part] / 2, abs=64), part
    for part in whole:
        assert two[part] == one[part], part
    assert (GATHERED in two) == (engine in ("zero3", "fsdp2"))
    assert ("gradient buckets" in two) == (engine == "ddp")


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    recipe = load_recipe_text(RECIPE, "planned.yaml")
    tight = Machine(CPU.overhead + 60 * 10**6, gpu=False)
    (stage,) = plan_recipe(recipe, tight, reload=lambda more: load_recipe_text(RECIPE, "p", more), only=["kd"]).stages
    rows = stage.largest_rows
    assert rows is not None and rows > 2

    def total(count: int) -> int:
        return plan(f"stages.kd.trainer.per_device_train_batch_size={count}").memory.total

    assert total(rows) <= tight.memory < total(rows + 1)


@pytest.mark.parametrize("function", [lambda n: 10 * n, lambda n: 5 + n * n, lambda n: max(300, 30 * n)])
def test_largest_rows(function: Callable[[int], int]) -> None:
    for memory in (1, 9, 10, 35, 299, 300, 1000, 12345):
        expected = max((n for n in range(1, 4097) if function(n) <= memory), default=0)
        assert largest_rows(function, memory) == expected


def test_advice_is_the_cheapest_change_that_fits() -> None:
    def advised(memory: int, *overrides: str) -> StagePlan:
        def reload(more: Any) -> Any:
            return load_recipe_text(RECIPE, "planned.yaml", [*overrides, *more])

        return plan_recipe(reload([]), Machine(CPU.overhead + memory, gpu=False), reload, only=["kd"]).stages[0]

    many = "stages.kd.trainer.per_device_train_batch_size=64"
    smaller = advised(60 * 10**6, many)
    assert not smaller.fits
    (change,) = smaller.changes
    assert change.overrides[0].startswith("stages.kd.trainer.per_device_train_batch_size=")
    assert plan(many, *change.overrides).memory.total <= CPU.overhead + 60 * 10**6
    rows, steps = (int(override.rpartition("=")[2]) for override in change.overrides)
    assert rows * steps == 64, "the batch of a step stays the same"
    student = PATH.format("kd")
    memory = plan(student).static - 10**6
    lora = advised(memory, student)
    assert [change.what for change in lora.changes] == ["LoRA"]
    assert plan(student, *lora.changes[0].overrides).memory.total <= CPU.overhead + memory
    assert advised(10**6).changes == ()


def test_operations_count_each_product_twice() -> None:
    values = 6 * (4 * 128 * 128 + 3 * 128 * 256) + 500 * 128
    tokens = 2 * 64
    off = ("stages.kd.trainer.gradient_checkpointing=false", "stages.kd.type=sft", "stages.kd.teacher=null")
    attention = 3 * 2 * tokens * 64 * 128 * 6
    assert plan(*off).operations == 6 * values * tokens + attention
    assert plan(*off, "stages.kd.trainer.gradient_accumulation_steps=3").operations == 3 * plan(*off).operations


def test_defaults_are_those_of_the_trainers() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(DAEConfig)}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS


def test_a_student_that_writes_needs_keys_and_values() -> None:
    on_policy = ("stages.kd.loss.on_policy=0.5", "stages.kd.loss.max_new_tokens=48")
    buffer = "stages.kd.loss.rollout_buffer={}"
    phase = "the student writes"
    rows, tokens, layers, width = 8, 64, 6, 128
    few, many, most = (parts(*on_policy, buffer.format(n), phase=phase)[KEYS_AND_VALUES] for n in (4, 8, 1000))
    assert 2 * few == many == rows * tokens * layers * 2 * width * 4
    assert most == ROLLOUT_BATCH * many // rows
    assert (
        few * 2
        == parts(*on_policy, "stages.kd.student.config.num_key_value_heads=4", buffer.format(8), phase=phase)[KEYS_AND_VALUES]
    )
    grouped = parts(*on_policy, "stages.kd.student.config.num_key_value_heads=1", buffer.format(8), phase=phase)
    assert grouped[KEYS_AND_VALUES] == many // 4
    forward = 2 * 128 * (6 * (4 * 128 * 128 + 3 * 128 * 256) + 500 * 128) + 2 * 128 * 64 * 128 * 6
    assert plan(*on_policy).operations - plan().operations == forward // 2


def test_answers_of_the_report_are_counted() -> None:
    """Of models whose shapes are known: here a llama with 6 layers and 128 channels, trained and as it was."""
    models = "[student-as-it-was, kd, {name: other, path: no/model}]"
    evaluation = f"evaluation={{models: {models}, limit: 5, batch_size: 3, max_new_tokens: 7}}"
    recipe = load_recipe_text(RECIPE, "planned.yaml", ["sources.shop.holdout=9", evaluation])
    whole = plan_recipe(recipe, CPU)
    answers = whole.answers
    assert answers is not None and answers.models == ("student-as-it-was", "kd") and answers.rows == 5
    assert answers.key_value_bytes == 3 * (64 + 7) * 6 * 2 * 128 * 4
    tokens = 5 * (64 + 7)
    once = 2 * tokens * (6 * (4 * 128 * 128 + 3 * 128 * 256) + 500 * 128) + 2 * tokens * (64 + 7) * 128 * 6
    assert answers.operations == 2 * once
    text = format_plan(whole)
    assert "[answers of the report] 2 models" in text and "at most 5 rows each, 70 tokens" in text
    silent = load_recipe_text(RECIPE, "planned.yaml", ["sources.shop.holdout=9", evaluation, "evaluation.generate=false"])
    assert plan_recipe(silent, CPU).answers is None


WRITTEN = (
    "sources.made={domain: general, generated: {model: 'stage:kd', prompts: PROMPTS, max_new_tokens: 10, batch_size: 4ROWS}}"
)
MIXED = "stages.dae.data={text: 0.5, shop: 0.3, made: 0.2}"


def forward(tokens: int, length: int) -> int:
    """Of the llama above: two operations per weight and token, and attention to half of the keys."""
    return 2 * tokens * (6 * (4 * 128 * 128 + 3 * 128 * 256) + 500 * 128) + 2 * tokens * length * 128 * 6


def test_rows_that_a_model_writes_are_counted() -> None:
    own = WRITTEN.replace("PROMPTS", "{written: self, max_new_tokens: 6}").replace("ROWS", ", rows: 40")
    recipe = load_recipe_text(RECIPE, "planned.yaml", [own, MIXED])
    whole = plan_recipe(recipe, CPU, prompts=lambda name: (None, 9))
    (plan,) = whole.generated
    assert (plan.what, plan.models, plan.rows, plan.new_tokens, plan.attempts) == ("sources.made", ("kd",), 40, 16, 2000)
    assert plan.key_value_bytes == 4 * (9 + 10) * 6 * 2 * 128 * 4
    assert plan.operations == forward(40 * 19, 19) + forward(40 * 6, 6)
    text = format_plan(whole, tflops=1e-6)
    assert "[sources.made] kd writes 16 tokens a row at most" in text and "40 rows, 640 tokens at most" in text
    assert f"{plan.operations / 1e6:,.1f} s at 1e-06 TFLOP/s; attempts that are no row come on top, to 2,000" in text
    assert plan_json(whole, 1e-6)["generated"][0]["seconds"] == pytest.approx(plan.operations / 1e6)
    assert not plan_recipe(recipe, CPU, only=["dae"]).generated


def test_prompts_say_how_many_rows_there_are_or_why_not(tmp_path: Path) -> None:
    asked = WRITTEN.replace("PROMPTS", "{source: shop}").replace("ROWS", "")
    recipe = load_recipe_text(RECIPE, "planned.yaml", [asked, MIXED])
    (plan,) = plan_recipe(recipe, CPU, prompts=lambda name: (7, 20)).generated
    assert (plan.rows, plan.attempts) == (7, None) and plan.operations == forward(7 * 30, 30)

    def missing(name: str) -> tuple[int, int]:
        raise UserError("no such file; give another")

    whole = plan_recipe(recipe, CPU, prompts=missing)
    (plan,) = whole.generated
    assert (plan.rows, plan.operations, plan.unread) == (None, None, "no such file")
    assert plan.key_value_bytes == 4 * (64 + 10) * 6 * 2 * 128 * 4
    assert "how many rows is not known: no such file" in format_plan(whole)
    served = [asked.replace("'stage:kd'", "'https://host/v1#big'"), MIXED]
    (plan,) = plan_recipe(load_recipe_text(RECIPE, "planned.yaml", served), CPU, prompts=lambda name: (7, 20)).generated
    assert (plan.models, plan.rows, plan.key_value_bytes, plan.operations) == (("big",), 7, None, None)


# ---- the command, and the run ---


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
    return path


def test_the_command_prints_a_table_and_json(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(recipe_file), "--gpu", "2GB", "--tflops", "100", "stages.kd.trainer.max_length=32"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "[kd] per GPU of 1: 2 rows of 32 tokens" in table and "planned peak" in table and "at 100 TFLOP/s" in table
    assert main([*arguments, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages) == ["kd", "dae"]
    for stage in stages.values():
        assert sum(stage["parts"].values()) == stage["total"] and stage["fits"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--gpu", "much"], "much: give a size such as 80GB or 24GiB"),
        (["--gpu", "24"], "24: is a number of bytes; 24GB?"),
        (["--gpu=-4GB"], "a device has more than no memory"),
        (["--gpu", "4GB", "--cpu", "4GB"], "a recipe runs on one of them"),
        (["--gpu", "4GB", "--engine", "fsdp2"], "one device shares its work with nobody"),
        (["--gpu", "4GB", "--gpus", "0"], "at least 1"),
        (["--gpu", "4GB", "stages.kd.student={path: no/model}"], r"stages.kd: no/model: its shape is not known"),
        (["--gpu", "4GB", "stages.kd.trainer.max_length=null"], "without a longest row"),
    ],
)
def test_bad_input(recipe_file: Path, options: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), *options]) == 2
    assert wanted in capsys.readouterr().err


def test_sizes() -> None:
    assert machine_of("80GB", None, 1, None) == Machine(80 * 10**9)
    assert machine_of(None, "24GiB", 1, None) == Machine(24 * 2**30, gpu=False)
    assert machine_of("1.5TB", None, 4, None) == Machine(15 * 10**11, count=4, engine="ddp")


def announced(recipe_file: Path, memory: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(announcement, "this_machine", lambda cpu=False: Machine(memory, gpu=False))

    def reload(more: Any) -> Any:
        return load_recipe_text(recipe_file.read_text(), "planned.yaml", [*overrides, *more])

    announcement.announce(reload([]), reload)


def test_a_run_that_cannot_fit_is_stopped_before_loading(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announced(recipe_file, 10**9, monkeypatch)
    assert "[kd] planned peak 0.7" in (said := capsys.readouterr().out) and "of 1.0 GB" in said
    assert "warning" not in said
    with pytest.raises(UserError, match=r"stages.kd: too large for this machine: .*Nothing has been loaded(.|\n)*planned peak"):
        announced(recipe_file, plan().static // 2, monkeypatch)
    # whether rows are that long is not known before they are read: it may fit, so nothing is stopped
    announced(recipe_file, plan(stage="dae").static + 10**6, monkeypatch, "stages.kd.trainer.per_device_train_batch_size=64")
    assert "[kd] warning: it may run out of memory" in capsys.readouterr().out
    announced(recipe_file, 10**9, monkeypatch, "stages.kd.student={path: no/model}")
    assert "[kd] no plan of its memory: stages.kd: no/model" in capsys.readouterr().out


# ---- measured ---


@pytest.mark.parametrize("name", ["small-full", "small-dae"])
def test_plan_and_measurement_agree(name: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import planning
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    row = planning.run(name, "1")
    assert abs(row["error"]) < 0.1, row
