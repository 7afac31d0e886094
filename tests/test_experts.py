"""Experts in 4 and 8 bits: the layer and the model equal their twins with dequantised weights, and nothing of those stays."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models import quantization
from daekit.models import quantized_loading as quantiser
from daekit.models.adapters import load_continued, load_frozen, require_adapters_fit
from daekit.models.backbone import add_on_hidden, frozen_copy, frozen_forward, hidden_at_loss_positions
from daekit.models.experts import IMPLEMENTATION, PROJECTIONS, QuantisedExperts, quantise_experts
from daekit.models.heads import output_head
from daekit.models.identity import fingerprint
from daekit.models.loading import load_model, load_whole
from daekit.models.quantization import stored_weights
from daekit.recipe.schema import ModelSpec
from daekit.trainers.validation import refuse_adapter
from tests.helpers import tiny
from tests.helpers.expert_models import KINDS, dequantised, layers_of_experts, moe, relative
from tests.helpers.teacher_cases import batch_of


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_layer_equals_its_twin(kind: str, bits: int, dtype: torch.dtype, implementation: str) -> None:
    """Value, and gradients of the hidden states and of the router's weights; expert 1 is never chosen."""
    model = moe(kind).to(dtype)
    layer = layers_of_experts(model)[0]
    for name, parameter in list(layer.named_parameters()):
        if "bias" in name:
            nn.init.normal_(parameter)
        if name in PROJECTIONS:
            quantise_experts(layer, name, parameter.detach(), bits, dtype)
    twin = dequantised(layer, dtype, implementation)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 64, generator=generator).to(dtype)
    choice = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(13)])
    choice[choice == 1] = 3
    weights = torch.rand(13, 2, generator=generator)
    direction = torch.randn(13, 64, generator=generator).to(dtype)
    results = []
    for one in (layer, twin):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        out = one(x, choice, w)
        assert out.dtype == dtype
        out.backward(direction)
        results.append((out.detach(), x.grad, w.grad))
    assert layer.config._experts_implementation == IMPLEMENTATION or implementation == "eager"
    for mine, theirs in zip(*results, strict=True):
        assert relative(mine, theirs) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_run_in_the_compute_dtype_or_that_of_autocast(bits: int) -> None:
    """To the bit, whatever dtype the hidden states have."""
    experts = QuantisedExperts(torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0)), bits, torch.float16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for autocast, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        with torch.autocast("cpu", enabled=autocast):
            out = experts(x, 1, False)
        assert out.dtype == dtype and torch.equal(out, x.to(dtype) @ experts.weight(1, dtype).T)


# ---- whole models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("moe")
    for kind in KINDS:
        moe(kind).save_pretrained(folder / kind)
    return lambda kind: str(folder / kind)


def load(path: str, bits: str = "4bit", dtype: str = "float32") -> Any:
    return load_model(ModelSpec(path=path, quantization=bits, dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_experts_are_quantised_while_loading(kind: str, bits: str, saved: Any, capsys: Any) -> None:
    model = load(saved(kind), bits)
    said = capsys.readouterr().out
    assert saved(kind) in said and "of the parameters" not in said and "parameters are quantised" in said
    packed = [module for module in model.modules() if isinstance(module, QuantisedExperts)]
    assert len(packed) == 4
    size = sum(p.nbytes for module in packed for p in module.parameters()) / sum(module.values for module in packed)
    assert size < (0.60 if bits == "4bit" else 1.1)
    original = moe(kind)
    for mine, theirs in zip(layers_of_experts(model), layers_of_experts(original), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            for expert in range(mine.num_experts):  # nf4 errs by about 10% of a normal weight, 8 bits by 1%
                error = relative(getattr(mine, name).weight(expert, torch.float32), getattr(theirs, name)[expert])
                assert error < (0.12 if bits == "4bit" else 0.02)
    stored = list(stored_weights(model))
    assert sum(weight.values for weight in stored) == sum(p.numel() for p in original.parameters())
    assert sum(weight.values for weight in stored if weight.quantised) > 0.8 * sum(weight.values for weight in stored)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_frozen_model_keeps_no_dequantised_weights(kind: str, saved: Any, monkeypatch: Any) -> None:
    """Copies say the same, also after a forward in eval mode; every dequantised weight is gone when the next one is made."""
    model, batch = load(saved(kind)), batch_of()
    alive: list[Any] = []
    original = QuantisedExperts.weight

    def weight(self: QuantisedExperts, expert: int, dtype: torch.dtype) -> Tensor:
        assert not any(reference() is not None for reference in alive)
        made = original(self, expert, dtype)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(QuantisedExperts, "weight", weight)
    twin = frozen_copy(model)
    before = fingerprint(model)
    with frozen_forward(model):
        first = model(**batch.inputs).logits
    assert torch.equal(first, twin(**batch.inputs).logits)
    assert alive and not any(reference() is not None for reference in alive)
    assert fingerprint(model) == before == fingerprint(twin)
    layers_of_experts(twin)[0].down_proj.absmax.add_(1)
    assert fingerprint(twin) != before


TARGETS = ["q_proj", "v_proj", "o_proj"]


def student(base: Any, checkpointing: bool) -> Any:
    torch.manual_seed(5)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False))
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return adapted.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_qlora_student_equals_its_twin(bits: str, autocast: bool, checkpointing: bool, saved: Any) -> None:
    """The gradient of every adapter; nothing that is saved for backward is as large as an expert."""
    if bits == "8bit" and autocast:
        pytest.skip("LLM.int8 computes in float16 whatever autocast says")
    results = []
    base = load(saved("mixtral"), bits)
    dtype = torch.bfloat16 if autocast else torch.float32
    expert = layers_of_experts(base)[0].down_proj.shape.numel()
    for one in (dequantised(base, dtype, "eager"), base):
        model, sizes = student(one, checkpointing), []
        add_on_hidden(model)

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
            hidden = hidden_at_loss_positions(model, batch_of())
        assert one is not base or max(sizes) < expert
        (hidden.float() @ output_head(model, 40).weight.float().T).log_softmax(-1)[:, 7].sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        results.append(torch.cat([grad.flatten() for grad in grads[-12:]]))
    assert results[1].norm() > 0
    assert relative(results[1], results[0]) < (2e-2 if autocast else 1e-5)


def test_adapters(saved: Any) -> None:
    """all-linear: attention gets adapters, experts do not; naming experts is an error."""
    base = load(saved("mixtral"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    refuse_adapter(base, config)
    trained = [name for name, p in get_peft_model(base, config).named_parameters() if p.requires_grad]
    assert sum("self_attn" in name for name in trained) == 2 * 4 * 2 and not any("experts" in name for name in trained)
    plain = load(saved("mixtral"))
    for bad in (["q_proj", "w1", "w3"], ["q_proj", "down_proj"], r".*\.(q_proj|w2)", [r"experts.gate_up_proj"]):
        with pytest.raises(UserError, match="names experts, which are quantised"):
            refuse_adapter(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=bad))
    with pytest.raises(UserError, match=r"'mlp.experts.down_proj' names experts"):
        refuse_adapter(plain, LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]))
    for good in (["q_proj"], r".*\.q_proj"):
        refuse_adapter(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=good))
    refuse_adapter(moe("mixtral"), LoraConfig(task_type="CAUSAL_LM", target_modules=["w1", "w3"]))


def test_an_adapter_that_sits_on_experts_is_named_before_its_quantised_base_is_read(
    saved: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """On the 16-bit base it runs; on the quantised one PEFT would leave its expert matrices out."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved("mixtral")), config).save_pretrained(tmp_path)
    base = ModelSpec(path=saved("mixtral"), dtype="float32")
    require_adapters_fit([tmp_path], base)
    plain = get_peft_model(load(saved("mixtral")), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    monkeypatch.setattr(quantiser.library, "safe_open", None)  # nothing is read
    four = base.model_copy(update={"quantization": "4bit"})
    for refused in (
        lambda: require_adapters_fit([tmp_path], four),
        lambda: load_continued(four.model_copy(update={"adapter": str(tmp_path)})),
        lambda: load_frozen(plain, tmp_path, "expert"),
    ):
        with pytest.raises(UserError, match=r"matrices on experts \(.*down_proj\), which are quantised in this base"):
            refused()


# ---- what cannot be loaded -----------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_before_weights_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    moe("mixtral").save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    load(str(tmp_path))
    shards[1].unlink()
    monkeypatch.setattr(quantiser.library, "safe_open", None)  # nothing is opened
    for quantization_ in (None, "4bit"):
        with pytest.raises(UserError, match=rf"1 of {len(shards)} shards are missing: {shards[1].name}"):
            load_model(ModelSpec(path=str(tmp_path), quantization=quantization_))  # type: ignore[arg-type]
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index of the shards cannot be read"):
        load_model(ModelSpec(path=str(tmp_path)))


@pytest.fixture
def nothing_is_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(quantiser.library, "safe_open", None)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_device_without_the_quantisation(bits: str, saved: Any, monkeypatch: Any) -> None:
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb, "supported_torch_devices", {"cuda"})
    with pytest.raises(UserError, match=rf"quantization={bits} .* does not run on cpu here \(it supports cuda\)"):
        load(saved("mixtral"), bits)
    monkeypatch.undo()

    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setattr(bnb.nn.Linear8bitLt if bits == "8bit" else bnb.nn.Linear4bit, "forward", broken)
    with pytest.raises(UserError, match=r"\(no kernel\)"):
        load(saved("mixtral"), bits)


def test_rows_that_the_kernel_for_cpus_reads_wrongly(tmp_path: Path) -> None:
    """Why they are refused: bitsandbytes itself errs by a quarter there; experts (rows of 96 here) are read flat."""
    from bitsandbytes import functional as bnb

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    if relative(bnb.dequantize_4bit(codes, state), weight) < 0.12:
        pytest.skip("this CPU's kernel reads them right")
    tiny.model(hidden=48).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"q_proj has rows of 48 values, which is not a multiple of 64: on a CPU"):
        load(str(tmp_path))


def test_a_rank_without_a_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert quantization.rank_device() == torch.device("cuda", rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2"):
        quantization.rank_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert quantization.rank_device() == torch.device("cuda", 0)


def test_a_model_that_stays_unquantised_is_refused(saved: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantiser, "PROJECTIONS", ())  # transformers as it is: experts stay in 16 bits
    with pytest.raises(UserError, match=r"left most weights unquantised \(only \d+% of the parameters"):
        load(saved("mixtral"))


def test_a_checkpoint_that_is_quantised_already(saved: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Its own settings would win over the recipe's without a word; its experts are looked at, asked for or not."""
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(saved("mixtral"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"left most weights unquantised \(only \d+% of the parameters"):
        load_model(ModelSpec(path=str(tmp_path)))
    monkeypatch.setattr(quantiser.library, "safe_open", None)  # nothing is read
    with pytest.raises(UserError, match=r"quantised already \(bitsandbytes\), .* quantization=8bit"):
        load(str(tmp_path), "8bit")


def test_the_settings_of_the_user_and_of_transformers_stay_as_they_are(saved: Any) -> None:
    from transformers import BitsAndBytesConfig

    config = quantization.quantization_config(ModelSpec(path="a", quantization="4bit"))
    before, opened = config.to_dict(), quantiser.library.safe_open
    model = load_whole(AutoModelForCausalLM.from_pretrained, saved("mixtral"), {"quantization_config": config})
    assert config.to_dict() == before == model.config.quantization_config.to_dict()
    assert quantiser.library.safe_open is opened
    some = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    some.llm_int8_skip_modules = ["lm_head", "model.layers.0.mlp", "model.layers.1.mlp"]
    with pytest.raises(UserError, match=r"only \d+% of the parameters"):
        load_whole(AutoModelForCausalLM.from_pretrained, saved("mixtral"), {"quantization_config": some})


def test_other_settings_for_experts_are_refused(saved: Any) -> None:
    from transformers import BitsAndBytesConfig

    for options in (dict(bnb_4bit_quant_type="fp4"), dict(bnb_4bit_use_double_quant=False)):
        settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) | options
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        with pytest.raises(UserError, match=r"experts are quantised as nf4 with double quantisation"):
            load_whole(AutoModelForCausalLM.from_pretrained, saved("mixtral"), {"quantization_config": config})
