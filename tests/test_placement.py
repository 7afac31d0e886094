"""Teachers elsewhere than their student: offloaded layer by layer, or by a device map; what they say stays the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor

from daekit.errors import UserError
from daekit.models.backbone import decoder_layers
from daekit.models.heads import output_head
from daekit.models.identity import fingerprint
from daekit.models.loading import load_model
from daekit.models.offload import LayerOffload
from daekit.protocol import FeatureSpec, TeacherOutput
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from tests.helpers import families, tiny
from tests.helpers.teacher_cases import V, batch_of

CPU = torch.device("cpu")


def tensors_of(teacher: ModelTeacher, features: bool = False) -> list[Tensor]:
    """All tensors of a teacher's output for a batch."""
    spec = FeatureSpec(teacher.model.config, attention="uniform", hidden="uniform")
    (output,) = teacher.outputs(batch_of(), spec if features else None)
    (member,) = output.members
    return [member.hidden_MH, member.head.weight, *_features(output)]


def _features(output: TeacherOutput) -> list[Tensor]:
    if output.features is None:
        return []
    attention = [tensor for layer in output.features.attention.values() for tensor in (layer.query_NAD, layer.key_BGTD)]
    return [*attention, *output.features.hidden_MH.values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def teacher_model(kind: str, tmp_path: Path) -> Any:
    """Three layers (an odd number: the last and the first meet), 4-bit where asked for."""
    name, _, bits = kind.partition("-")
    model = tiny.model(name, seed=2, hidden=64, num_hidden_layers=3, sliding_window=3)
    if not bits:
        return model
    model.save_pretrained(tmp_path)
    return load_model(ModelSpec(path=str(tmp_path), quantization="4bit", dtype="float32", offload=True))


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "mistral-4bit", "mixtral-4bit"])
def test_an_offloaded_teacher_says_the_same(kind: str, tmp_path: Path) -> None:
    """To the bit, several times, also looked into; its weights are those of before, and can be told by them."""
    plain = ModelTeacher(teacher_model(kind, tmp_path), V)
    before = fingerprint(plain.model)
    moved = ModelTeacher(copy.deepcopy(plain.model), V, offload=True).to(CPU)
    assert moved.layers is not None and moved.to(CPU).layers is moved.layers
    for features in (False, True, False):
        assert equal(tensors_of(plain, features), tensors_of(moved, features))
    assert fingerprint(moved.model) == before == moved.identity()["weights"]


def test_at_most_two_layers_are_on_the_device() -> None:
    """The one that runs lies in one of two slots, the next one is in the other; behind the run all tensors are the host's."""
    model = tiny.model(seed=2, num_hidden_layers=5).requires_grad_(False).eval()
    host = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offload = LayerOffload(model, CPU)
    layers = decoder_layers(model)
    homes = [{tensor.data_ptr() for tensor in layer.parameters()} for layer in layers]
    slots = [range(slot.buffer.data_ptr(), slot.buffer.data_ptr() + slot.buffer.numel()) for slot in offload._slots]
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    assert all(len(slot) < largest + 256 * 12 for slot in slots)
    seen = []

    def look(layer: Any, *_: Any) -> None:
        index = layers.index(layer)
        seen.append((index, sorted(offload.resident())))
        for other, part in enumerate(layers):
            where = {next((n for n, slot in enumerate(slots) if p.data_ptr() in slot), None) for p in part.parameters()}
            assert len(where) == 1 and (where == {None}) == (other != index)

    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_, layer=layer: look(layer))
    for _ in range(2):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    order = [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4]), (4, [0, 4])]
    assert seen == order * 2
    assert homes == [{tensor.data_ptr() for tensor in layer.parameters()} for layer in layers]
    assert all(torch.equal(tensor, host[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_fails_goes_home_and_the_next_run_is_right() -> None:
    model = tiny.model(seed=2).requires_grad_(False).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids=ids).logits
    LayerOffload(model, CPU)
    weight = decoder_layers(model)[1].mlp.up_proj.weight
    home = weight.data_ptr()

    def fail(*_: Any) -> None:
        assert weight.data_ptr() != home
        raise RuntimeError("broken")

    hook = decoder_layers(model)[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(input_ids=ids)
    assert weight.data_ptr() == home
    hook.remove()
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_what_cannot_be_offloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"offload: .* is trained"):
        LayerOffload(tiny.model(), CPU)
    tiny.model(hidden=64).save_pretrained(tmp_path)
    eight = load_model(ModelSpec(path=str(tmp_path), quantization="8bit")).requires_grad_(False)
    with pytest.raises(UserError, match=r"offload: .*q_proj is in LLM.int8"):
        LayerOffload(eight, CPU)


# ---- device maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_ends_of_a_model_that_accelerate_offloads_are_held(where: str, tied: bool, tmp_path: Path) -> None:
    """Its output head is a meta tensor, which a product takes without an error: refused as it is, real in a teacher."""
    model = tiny.model(seed=2, tie_word_embeddings=tied).requires_grad_(False).eval()
    plain = tensors_of(ModelTeacher(copy.deepcopy(model), V))
    _ = cpu_offload(model, CPU) if where == "cpu" else disk_offload(model, str(tmp_path), CPU)
    assert model.lm_head.weight.is_meta and model.model.layers[0].mlp.up_proj.weight.is_meta
    with pytest.raises(UserError, match="output head is on the meta device"):
        output_head(model, V)
    teacher = ModelTeacher(model, V)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta  # the rest stays where it was
    for _ in range(2):
        assert equal(tensors_of(teacher), plain)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = tiny.model()
    with pytest.raises(UserError, match="its weights are on the meta device, and nobody knows where they are"):
        ModelTeacher(model, V)


def test_device_maps_of_a_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    tiny.model(seed=2).save_pretrained(tmp_path)
    whole = tensors_of(ModelTeacher(load_model(ModelSpec(path=str(tmp_path))), V))
    for device_map in ("cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        spec = ModelSpec(path=str(tmp_path), device_map=device_map)  # type: ignore[arg-type]
        assert equal(tensors_of(ModelTeacher(load_model(spec), V).to(CPU)), whole)
    monkeypatch.setattr("daekit.models.loading.load_whole", None)  # said before anything is loaded
    for device_map, message in (
        ("cuda:7", "names cuda:7, but there are 0 GPUs"),
        ({"model": "3"}, "names 3, but there are 0 GPUs"),
        ("xpu:0", "names xpu:0, but there are no xpu devices"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(ModelSpec(path=str(tmp_path), device_map=device_map))  # type: ignore[arg-type]


def test_a_model_that_is_left_on_the_disk_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """By ``auto``, as a recipe cannot say it."""
    monkeypatch.setattr("daekit.models.loading.device_map_of", lambda _: {"model": "disk", "lm_head": "cpu"})
    tiny.model(seed=2).save_pretrained(tmp_path / "model")
    spec = ModelSpec(path=str(tmp_path / "model"), device_map="auto")
    with pytest.raises(UserError, match=r"leaves some of it on the disk"):
        load_model(spec)


@pytest.mark.parametrize(
    "family", ["mistral3", "gemma4", "falcon", "bloom", "mamba", "jamba", "gpt_neo", "mpt", "codegen", "olmo_hybrid", "zamba2"]
)
def test_families_are_offloaded(family: str) -> None:
    """Their layers are in the host's memory, and the logits are those of before."""
    # one block of attention in two layers
    fields = dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3])
    model = families.model(family, **(fields if family == "zamba2" else {})).float().requires_grad_(False)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        offload = LayerOffload(model, CPU)
        assert len(offload.layers) == model.config.get_text_config().num_hidden_layers
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
