"""What the field does with its hardware: each works as the plain run does, or is refused before any weight is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import sft_trainer

from daekit.errors import UserError
from daekit.models.loading import load_model
from daekit.models.quantization import pack_as
from daekit.planning.machine import machine_of
from daekit.planning.plan import plan_recipe
from daekit.planning.show import format_plan
from daekit.recipe import load_recipe_text
from daekit.recipe.schema import ModelSpec
from daekit.runtime.prepare import prepare
from daekit.trainers import KDConfig
from tests.helpers import quantised_checkpoints, tiny
from tests.helpers.adapter_world import save_base
from tests.helpers.trainer_world import (
    dae,
    kd,
    logged,
    lora,
    loss_and_gradient,
    micro_batches,
    mixed_rows,
    options,
    relative,
    weights,
)

ROUNDING = 1e-5
INSIDE = {"attention_weight": 0.5, "hidden_weight": 0.5}
RECIPE = """
name: hardware
output_dir: OUT/run
sources: {chat: {path: OUT/rows.jsonl, domain: general}}
stages:
  kd: {type: kd, student: {path: OUT/base}, teacher: {path: OUT/base}, data: [chat],
       trainer: {max_steps: 1, max_length: 64, gradient_checkpointing: false, use_cpu: true}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.rows(8, domains=("general",)).remove_columns("domain").to_json(tmp_path / "rows.jsonl")
    return save_base(tmp_path / "base")


def prepared(folder: Path, *overrides: str) -> None:
    """Everything that is done before weights are loaded."""
    text = RECIPE.replace("OUT", str(folder))
    prepare(load_recipe_text(text, "hardware.yaml", [each.replace("OUT", str(folder)) for each in overrides]))


def first_step(folder: Path, student: Any = None, teacher: Any = None, **changes: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one batch."""
    trainer = kd(folder, mixed_rows(), student, teacher, ce_weight=0.5, **changes)
    return loss_and_gradient(trainer, micro_batches(trainer, 8))


def require_same(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor], rounding: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=rounding)
    assert relative(one[1], other[1]) <= rounding


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_an_attention_implementation_of_each_model(student: str, teacher: str, base: Path) -> None:
    prepared(
        base.parent,
        f"stages.kd.student.attn_implementation={student}",
        f"stages.kd.teacher.attn_implementation={teacher}",
        "stages.kd.loss.ce_weight=0.5",
    )
    expert = save_base(base.parent / "expert", seed=5)

    def loaded(ours: str, theirs: str) -> tuple[float, torch.Tensor]:
        models = [load_model(ModelSpec(path=str(p), attn_implementation=a)) for p, a in ((base, ours), (expert, theirs))]
        assert [model.config._attn_implementation for model in models] == [ours, theirs]
        return first_step(base.parent / "out", *models)

    require_same(loaded(student, teacher), loaded("sdpa", "sdpa"), ROUNDING)


@pytest.mark.parametrize(
    ("who", "implementation", "reason"),
    [
        ("teacher", "flash_attention_2", "flash_attention_2 does not run here .*FlashAttention2"),
        ("student", "flash_attention_3", "flash_attention_3 does not run here .*FlashAttention3"),
        ("teacher", "kernels-community/flash-attn2", "does not run here .*pip install kernels"),
        ("student", "flash", "Specified .*flash.* is not supported"),
        ("teacher", "paged|eager", "is for serving"),
        ("student", "flex_attention", "has no backward pass on a CPU"),
    ],
)
def test_an_attention_that_does_not_run_here(who: str, implementation: str, reason: str, base: Path, no_weights: None) -> None:
    with pytest.raises(UserError, match=rf"stages\.kd\.{who}: .*{reason}"):
        prepared(base.parent, f"stages.kd.{who}.attn_implementation={implementation}")


def test_a_student_in_a_script_needs_a_backward_pass(tmp_path: Path) -> None:
    student = tiny.model(seed=1)
    student.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        kd(tmp_path, mixed_rows(), student)


def test_flash_attention_in_a_script(base: Path) -> None:
    with pytest.raises(UserError, match=r"could not be loaded \(FlashAttention2"):
        load_model(ModelSpec(path=str(base), attn_implementation="flash_attention_2"))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_the_attention_loss_sees_two_implementations(who: str, base: Path) -> None:
    changes = [f"stages.kd.{who}.attn_implementation=eager", "stages.kd.loss.attention_weight=1"]
    with pytest.raises(UserError, match=rf"{who}\.attn_implementation: eager: the attention loss sees sdpa and flash"):
        prepared(base.parent, *changes)


# ---- checkpoints that are quantised already ---------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


@pytest.mark.parametrize("make", [quantised_checkpoints.fp8, quantised_checkpoints.mxfp4, quantised_checkpoints.bitsandbytes])
def test_a_quantised_checkpoint_as_teacher(make: Callable[[Path], Any], base: Path) -> None:
    plain = make(base.parent / "packed")
    prepared(base.parent, "stages.kd.teacher=OUT/packed")
    teacher = load_model(ModelSpec(path=str(base.parent / "packed")))
    require_same(first_step(base, teacher=teacher), first_step(base, teacher=plain), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dequantised_checkpoint_has_one_dtype(dtype: str, base: Path) -> None:
    """transformers leaves what the checkpoint holds in 16 bits as it is, beside dequantised weights in what was asked for."""
    plain = quantised_checkpoints.fp8(base.parent / "packed")
    teacher = load_model(ModelSpec(path=str(base.parent / "packed"), dtype=dtype))
    assert {str(parameter.dtype) for parameter in teacher.parameters()} == {f"torch.{dtype}"}
    for parameter in plain.parameters():  # not the buffers: frequencies of rotary positions stay exact
        parameter.data = parameter.data.to(getattr(torch, dtype))
    require_same(first_step(base, teacher=teacher), first_step(base, teacher=plain), 0.0)


@pytest.mark.parametrize(
    ("method", "package"),
    [("gptq", "pip install optimum"), ("awq", "pip install gptqmodel"), ("compressed-tensors", "compressed-tensors"),
     ("hqq", "HQQ"), ("of-tomorrow", "Unknown quantization type")],
)  # fmt: skip
def test_a_quantised_checkpoint_whose_package_is_missing(method: str, package: str, base: Path, no_weights: None) -> None:
    quantised_checkpoints.unreadable(base.parent / "packed", method)
    with pytest.raises(UserError, match=rf"stages\.kd\.teacher: .*quantised already \({method}\).*{package}"):
        prepared(base.parent, "stages.kd.teacher=OUT/packed")
    with pytest.raises(UserError, match=rf"quantised already \({method}\).*{package}"):
        load_model(ModelSpec(path=str(base.parent / "packed")))


def test_a_quantised_checkpoint_is_no_student_that_is_trained_whole(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved, its weights would be rounded to 8 bits again: other weights than the trained ones."""
    quantised_checkpoints.fp8(base.parent / "packed")
    for more in ([], ["stages.kd.lora={r: 2, target_modules: [q_proj], merge: true}"]):
        with pytest.raises(UserError, match=r"stages\.kd\.student: .*quantised already \(fp8\).*when it is saved"):
            prepared(base.parent, "stages.kd.student=OUT/packed", *more)
    student = load_model(ModelSpec(path=str(base.parent / "packed")))
    with pytest.raises(UserError, match="was loaded from quantised weights"):
        kd(base, mixed_rows(), student)
    prepared(base.parent, "stages.kd.student=OUT/packed", "stages.kd.lora={r: 2, target_modules: [q_proj]}")


def test_an_adapter_on_a_quantised_checkpoint(base: Path) -> None:
    plain = quantised_checkpoints.fp8(base.parent / "packed")
    student = load_model(ModelSpec(path=str(base.parent / "packed")))
    steps = []
    for model in (student, plain):
        torch.manual_seed(0)  # of the adapter's first values
        steps.append(first_step(base, model, peft_config=lora(init_lora_weights=False)))
    require_same(*steps, 0.0)


def test_the_plan_says_what_it_does_not_count(base: Path) -> None:
    quantised_checkpoints.fp8(base.parent / "packed")
    text, machine = RECIPE.replace("OUT", str(base.parent)), machine_of(None, "1GB", 1, None)
    with pytest.raises(UserError, match=r"is quantised already \(fp8\); the memory of that is not planned"):
        plan_recipe(load_recipe_text(text, "", [f"stages.kd.teacher={base.parent}/packed"]), machine)
    recipe = load_recipe_text(text, "", ["stages.kd.trainer.activation_offloading=true"])
    assert "planned as if without activation_offloading, whose memory is not counted" in format_plan(
        plan_recipe(recipe, machine)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_that_pass_for_floats(dtype: torch.dtype, base: Path) -> None:
    """What FSDP2 is given to split computes what it did as bytes."""
    steps = []
    for packed in (False, True):
        student = load_model(ModelSpec(path=str(base), quantization="4bit", dtype="float32"))
        if packed:
            pack_as(student, dtype)
            assert student.model.layers[0].mlp.up_proj.weight.dtype == dtype
        torch.manual_seed(0)
        trainer = kd(base, mixed_rows(), student, ce_weight=0.5, peft_config=lora(init_lora_weights=False))
        loss, _ = loss_and_gradient(trainer, micro_batches(trainer, 8))
        # of what is trained: the packed weights have none, and as floats there are fewer of them
        trained = [p for _, p in sorted(trainer.model.named_parameters()) if p.requires_grad]
        steps.append((loss, torch.cat([p.grad.double().flatten() for p in trained])))
    assert steps[0][1].norm() > 0
    require_same(*steps, 0.0)


# ---- dtypes and optimizers ---------------------------------------------------------------------------------------------


def test_a_teacher_in_bfloat16(base: Path) -> None:
    """The student in float32 follows what the rounded teacher says; that is near what the exact one says."""
    teacher = load_model(ModelSpec(path=str(save_base(base.parent / "expert", seed=5)), dtype="bfloat16"))
    exact = load_model(ModelSpec(path=str(base.parent / "expert"), dtype="float32"))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    require_same(first_step(base, teacher=teacher), first_step(base, teacher=exact), 0.05)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_an_optimizer_with_8_bit_states(optim: str, tmp_path: Path) -> None:
    """Loss and gradient know nothing of it; its steps are those of AdamW but for the rounding of its states."""

    def trained(name: str, **changes: Any) -> Any:
        settings = dict(optim=name, learning_rate=1e-3, max_steps=6) | changes
        trainer = kd(tmp_path / name, mixed_rows(), tiny.model(seed=1, hidden=64), **settings)
        trainer.train()
        return trainer

    start = weights(tiny.model(seed=1, hidden=64))
    exact, rounded = trained("adamw_torch"), trained(optim, save_strategy="steps", save_steps=3)
    assert logged(rounded, "loss")[0] == logged(exact, "loss")[0]
    assert logged(rounded, "grad_norm")[0] == logged(exact, "grad_norm")[0]
    state = next(each for each in rounded.optimizer.state.values() if each["state1"].numel() >= 4096)
    assert state["state1"].dtype == torch.uint8
    assert 0 < relative(weights(rounded.model) - start, weights(exact.model) - start) < 0.1
    again = kd(tmp_path / optim, mixed_rows(), tiny.model(seed=1, hidden=64), optim=optim, learning_rate=1e-3, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / optim / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(rounded.model))


# ---- activations, Liger, compiled layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_wait_elsewhere(checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own copies, with the CPU in place of a GPU: what the losses save for the backward pass goes through them, too."""
    changes = dict(gradient_checkpointing=checkpointing, **INSIDE, attention_relation_heads=4, max_steps=2)

    def trained(offloaded: bool) -> Any:
        arguments = options(tmp_path, ce_weight=0.5, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu") if offloaded else None)
            plain = functools.partial(get_act_offloading_ctx_manager, use_streams=False, use_pin_memory=False)
            patch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
            patch.setattr(sft_trainer, "get_act_offloading_ctx_manager", plain)
            trainer = kd(tmp_path, mixed_rows(), max_steps=2)
            config = KDConfig(**arguments)
            config.activation_offloading = offloaded
            trainer = type(trainer)(tiny.model(seed=1), tiny.model(seed=2, hidden=48), config, mixed_rows(), tiny.tokenizer())
            trainer.train()
        if offloaded:
            assert trainer.maybe_activation_offload_context.tensor_id > 20, "nothing was kept elsewhere"
        return trainer

    one, other = trained(True), trained(False)
    assert logged(one, "loss") == logged(other, "loss") and torch.equal(weights(one.model), weights(other.model))


def test_what_needs_a_gpu_or_touches_the_loss(base: Path) -> None:
    for option, reason in {"activation_offloading": "this training is on the CPU", "use_liger_kernel": "own loss"}.items():
        with pytest.raises(UserError, match=reason):
            prepared(base.parent, f"stages.kd.trainer.{option}=true")
        with pytest.raises(UserError, match=reason):
            kd(base, mixed_rows(), **{option: True})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"gradient_checkpointing": True}),
        ("aot_eager", {"peft_config": lora(init_lora_weights=False)}),
        ("aot_eager", {"bf16": True, "packing": True}),
        ("inductor", {}),
    ],
)
def test_compiled_layers(backend: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        more = {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        trainer = kd(tmp_path, mixed_rows(), ce_weight=0.5, max_steps=3, **changes, **more)
        trainer.train()
        trained.append(trainer)
    layers = [module for module in trained[1].model.modules() if module._compiled_call_impl is not None]
    assert len(layers) == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    exact = backend != "inductor"  # it adds up in another order
    assert relative(weights(trained[1].model), weights(trained[0].model)) <= (0 if exact else 1e-6)
    assert logged(trained[1], "loss") == pytest.approx(logged(trained[0], "loss"), rel=0 if exact else 1e-6, abs=0)


def test_layers_that_are_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch_compile=True: attention and hidden states are caught by hooks"):
        kd(tmp_path, mixed_rows(), torch_compile=True, hidden_weight=1.0)
    with pytest.raises(UserError, match="torch_compile=True: was not tried with on-policy"):
        kd(tmp_path, mixed_rows(), torch_compile=True, on_policy_fraction=0.5, max_new_tokens=4)
    with pytest.raises(UserError, match="torch_compile=True: a teacher or the reference is an adapter"):
        dae(tmp_path, mixed_rows(), reference=None, peft_config=lora(), torch_compile=True)
