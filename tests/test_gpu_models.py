"""Quantised experts and offloaded teachers on a GPU: what they give on the CPU, or whole. Run by benchmarks/gpu.sh."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from daekit.models.backbone import decoder_layers
from daekit.models.experts import quantise_experts
from daekit.models.loading import load_model
from daekit.models.placement import moved
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from tests.helpers import tiny
from tests.helpers.expert_models import dequantised, layers_of_experts, moe, relative
from tests.helpers.teacher_cases import V, batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_experts(bits: int, dtype: torch.dtype) -> None:
    """A layer on the GPU, quantised there: value and gradient of the CPU's plain twin with the GPU's dequantised weights."""
    layer = layers_of_experts(moe("mixtral").to(dtype))[0].cuda()
    for name in ("gate_up_proj", "down_proj"):
        quantise_experts(layer, name, getattr(layer, name).detach(), bits, dtype)
    twin = dequantised(layer, dtype, "eager").cpu()
    generator = torch.Generator().manual_seed(1)
    hidden, direction = (torch.randn(13, 64, generator=generator).to(dtype) for _ in range(2))
    choice = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(13)])
    weights = torch.rand(13, 2, generator=generator)
    results = []
    for one, device in ((twin, "cpu"), (layer, "cuda")):
        x, w = hidden.to(device).requires_grad_(), weights.to(device).requires_grad_()
        one(x, choice.to(device), w).backward(direction.to(device))
        results.append([one(x, choice.to(device), w).detach().cpu(), x.grad.cpu(), w.grad.cpu()])
    for mine, theirs in zip(*results, strict=True):
        assert relative(mine, theirs) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_mixture_is_loaded_to_this_gpu(bits: Any, tmp_path: Any) -> None:
    """And says there what it says when the CPU has quantised it (the two may round a few codes otherwise)."""
    moe("mixtral").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), quantization=bits, dtype="bfloat16"))
    assert {p.device for p in model.parameters()} == {torch.device("cuda", 0)}
    there = load_model(ModelSpec(path=str(tmp_path), quantization=bits, dtype="bfloat16", offload=True))  # to the host
    assert {p.device for p in there.parameters()} == {torch.device("cpu")}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert relative(model(ids.cuda()).logits.float().cpu(), there(ids).logits.float()) < 0.05


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "mistral-4bit", "mixtral-4bit"])
def test_an_offloaded_teacher(kind: str, tmp_path: Any) -> None:
    """To the bit what the same model says that lies on the GPU whole; its memory is two layers and the ends."""
    name, _, bits = kind.partition("-")
    model = tiny.model(name, seed=2, hidden=64, num_hidden_layers=7)
    if bits:
        model.save_pretrained(tmp_path)
        model = load_model(ModelSpec(path=str(tmp_path), quantization="4bit", dtype="float32", offload=True))
    batch = moved(batch_of(), torch.device("cuda"))
    twin = copy.deepcopy(model).cuda()
    expected = ModelTeacher(twin, V).outputs(batch)[0].members[0]
    teacher = ModelTeacher(model, V, offload=True).to(torch.device("cuda"))
    layer = max(sum(p.nbytes for p in one.parameters()) for one in decoder_layers(model))
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        found = teacher.outputs(batch)[0].members[0]
        assert torch.equal(found.hidden_MH, expected.hidden_MH)
        assert all(p.device.type == "cpu" for one in decoder_layers(model) for p in one.parameters())
        assert torch.cuda.max_memory_allocated() - level < 3 * layer + 2**22  # activations; the slots are there already


def test_a_teacher_on_the_cpu_for_a_student_on_the_gpu(tmp_path: Any) -> None:
    """device_map: what it says arrives where the student is."""
    tiny.model(seed=2).save_pretrained(tmp_path)
    there = moved(batch_of(), torch.device("cuda"))
    teacher = ModelTeacher(load_model(ModelSpec(path=str(tmp_path), device_map="cpu")), V).to(torch.device("cuda"))
    (output,) = teacher.outputs(there)
    assert teacher.model.device.type == "cpu"
    assert output.members[0].hidden_MH.is_cuda and output.members[0].head.weight.is_cuda and output.positions_M.is_cuda
