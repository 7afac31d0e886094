"""Adapters of one base as teachers: the same words as a merged model, and nothing left behind in the student."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.models.adapters import adapter_parameters
from daekit.models.backbone import frozen_copy, hidden_at_loss_positions
from daekit.models.heads import output_head
from daekit.models.loading import load_model
from daekit.protocol import Batch, Teacher
from daekit.recipe.schema import ModelSpec
from daekit.teachers import AdapterTeacher, EnsembleTeacher, ModelTeacher, RoutedTeacher
from tests.helpers import tiny
from tests.helpers.teacher_cases import V, batch_of, says

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(seed: int = 0, base: Any = None, **lora: Any) -> PeftModel:
    """A student with a LoRA adapter that is not a no-op."""
    lora = dict(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False) | lora
    base = base if base is not None else tiny.model(seed=1)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))


def disturb(model: PeftModel) -> None:
    """One step of training, as it were."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def kl_to(speaker: Teacher, student: PeftModel, batch: Batch) -> Tensor:
    hidden = hidden_at_loss_positions(student, batch)
    return prediction_loss(hidden, output_head(student, V), batch.labels_N, speaker.outputs(batch), Objective()).loss


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": dict(use_dora=True, init_lora_weights=True),
    "rslora and patterns": dict(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "saved modules": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "pissa": dict(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", list(LORAS))
def test_a_copied_adapter_is_the_student_as_it_stood(kind: str) -> None:
    """KL exactly 0 at once; the same words after the student has moved on; KL exactly 0 when it is put back."""
    student, batch = adapted(**LORAS[kind]), batch_of()
    disturb(student)
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    marked = flags(student)
    reference = AdapterTeacher.copy_of_active(student, "reference", V)
    assert {name: flag for name, flag in flags(student).items() if name in marked} == marked
    assert not any(flag for name, flag in flags(student).items() if name not in marked)
    for name, parameter in student.named_parameters():
        assert name not in weights or torch.equal(parameter, weights[name]), name
    before = says(reference, batch)
    assert kl_to(reference, student, batch) == 0
    disturb(student)
    assert kl_to(reference, student, batch) > 1e-3
    assert torch.equal(says(reference, batch), before)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    assert kl_to(reference, student, batch) == 0


@pytest.mark.parametrize("kind", ["plain", "dora", "saved modules"])
def test_an_adapter_teacher_equals_the_merged_model(kind: str) -> None:
    student, batch = adapted(**LORAS[kind]), batch_of()
    disturb(student)
    speaker = AdapterTeacher.copy_of_active(student, "expert", V)
    disturb(student)
    base = AdapterTeacher(student, None, V)
    lone = copy.deepcopy(student)
    lone.set_adapter("expert")
    merged = ModelTeacher(frozen_copy(lone.merge_and_unload()), V)
    torch.testing.assert_close(says(speaker, batch), says(merged, batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(says(base, batch), says(ModelTeacher(tiny.model(seed=1), V), batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(says(base, batch), says(speaker, batch), atol=1e-2)


def test_a_mixture_of_experts_student_with_adapted_experts() -> None:
    base = tiny.model("mixtral", seed=1)
    student, batch = adapted(base=base, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), batch_of()
    reference = AdapterTeacher.copy_of_active(student, "reference", V)
    assert kl_to(reference, student, batch) == 0
    disturb(student)
    assert kl_to(reference, student, batch) > 1e-3


@pytest.mark.parametrize("adapter", ["reference", None])
def test_what_an_adapter_teacher_leaves_behind(adapter: str | None) -> None:
    """Dropout is off while it speaks; adapter, flags and the mode of every module are as before, also after an error."""
    student, batch = adapted(lora_dropout=0.5, modules_to_save=["lm_head"]), batch_of()
    AdapterTeacher.copy_of_active(student, "reference", V)
    speaker = AdapterTeacher(student, adapter, V)
    student.train()
    student.base_model.model.model.layers[1].eval()  # a mixed mode survives too
    for name, parameter in student.named_parameters():
        if "lora_A.default" in name:
            parameter.requires_grad_(False)  # and so does a half of the adapter that the user has frozen
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = flags(student), [module.training for module in student.modules()], student.active_adapters
    assert torch.equal(says(speaker, batch), says(speaker, batch))
    broken = replace(batch, inputs={"input_ids": torch.tensor([[10**6]])})
    with pytest.raises(IndexError):
        speaker.outputs(broken)
    assert (flags(student), [module.training for module in student.modules()], student.active_adapters) == before
    kl_to(speaker, student, batch).backward()
    assert {id(p) for p in student.parameters() if p.grad is not None} <= {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("adapter", ["reference", None])
def test_gradient_checkpointing_changes_no_gradient(adapter: str | None) -> None:
    """A teacher's adapter left active until backward would be recomputed with: the student's gradient would be exactly 0."""
    gradients = []
    for checkpointing in (False, True):
        student, batch = adapted(), batch_of()
        AdapterTeacher.copy_of_active(student, "reference", V)
        speaker = AdapterTeacher(student, adapter, V)
        disturb(student)
        student.train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.enable_input_require_grads()
        outputs = speaker.outputs(batch)
        hidden = hidden_at_loss_positions(student, batch)
        speaker.outputs(batch)  # and once more between forward and backward
        prediction_loss(hidden, output_head(student, V), batch.labels_N, outputs, Objective()).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    without, with_checkpointing = gradients
    assert without.keys() == with_checkpointing.keys()
    for name, gradient in without.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(with_checkpointing[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_base_of_four_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """QLoRA, with the adapter in float32 or in bfloat16 as TRL casts it: KL exactly 0, then a gradient for the student only."""
    tiny.model(seed=1, hidden=64).save_pretrained(tmp_path)
    base = load_model(ModelSpec(path=str(tmp_path), quantization="4bit", dtype="bfloat16"))
    assert base.is_loaded_in_4bit and base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    student, batch = adapted(base=base, lora_dropout=0.3), batch_of()
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    reference = AdapterTeacher.copy_of_active(student, "reference", V)
    student.eval()
    assert kl_to(reference, student, batch) == 0
    disturb(student)
    student.train()
    loss = kl_to(reference, student, batch)
    loss.backward()
    assert loss > 0
    for parameter in student.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or (parameter.grad.dtype == dtype and parameter.grad.abs().sum() > 0)
    assert reference.identity() == reference.identity() != AdapterTeacher(student, None, V).identity()


def test_identity_of_an_adapter_teacher() -> None:
    """It tells adapters and bases apart, wherever they differ, and does not change when the student learns."""
    student = adapted(modules_to_save=["embed_tokens"])
    reference, base = AdapterTeacher.copy_of_active(student, "reference", V), AdapterTeacher(student, None, V)
    before = reference.identity(), base.identity()
    disturb(student)
    assert (reference.identity(), base.identity()) == before
    assert reference.identity() != base.identity()
    other = tiny.model(seed=1)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert AdapterTeacher(adapted(base=other, modules_to_save=["embed_tokens"]), None, V).identity() != base.identity()
    stranger = adapted(seed=5, modules_to_save=["embed_tokens"])
    assert AdapterTeacher.copy_of_active(stranger, "reference", V).identity() != reference.identity()


def test_an_adapter_that_is_not_loaded_is_an_error() -> None:
    with pytest.raises(UserError, match="'expert' is not loaded; the model has: default"):
        AdapterTeacher(adapted(), "expert", V)


@pytest.mark.parametrize("name", ["mlp", "q_proj", "model", "lora_A"])
def test_an_adapter_with_the_name_of_a_part_of_the_base(name: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    student = get_peft_model(tiny.model(seed=1), config, adapter_name=name)
    plain = adapted(modules_to_save=["lm_head"])
    assert adapter_parameters(student, name).keys() == adapter_parameters(plain, "default").keys()
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    assert {*map(id, adapter_parameters(student, name).values())} == trained
    reference = AdapterTeacher.copy_of_active(student, "reference", V)
    assert {id(parameter) for parameter in student.parameters() if parameter.requires_grad} == trained
    assert kl_to(reference, student, batch_of()) == 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_the_biases_of_the_base(bias: str) -> None:
    student = adapted(bias=bias)
    for make in (lambda: AdapterTeacher.copy_of_active(student, "reference", V), lambda: AdapterTeacher(student, None, V)):
        with pytest.raises(UserError, match=rf"adapter 'default': bias='{bias}' .*Use bias='none', or give"):
            make()


def test_adapters_route_and_average_like_models() -> None:
    student, batch = adapted(), batch_of("packed")
    reference = AdapterTeacher.copy_of_active(student, "reference", V)
    disturb(student)
    expert = AdapterTeacher.copy_of_active(student, "expert", V)
    base = AdapterTeacher(student, None, V)
    routed = RoutedTeacher({"general": EnsembleTeacher([reference, base], [0.8, 0.2]), "shop": expert, "law": base})
    said = says(routed, batch)
    for row, domain in enumerate(batch.domains):
        alone = says(routed.routes[domain], batch.select([row]))
        torch.testing.assert_close(said[batch.positions_of([row])], alone, rtol=1e-4, atol=1e-5)
    assert student.active_adapters == ["default"]
