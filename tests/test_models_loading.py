"""From a recipe's model to weights, and from a checkpoint back into a live model: whole, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models.backbone import add_on_hidden, base_of
from daekit.models.loading import load_model
from daekit.models.quantization import keep_four_bit_weights
from daekit.models.restore import restore_weights
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny

SMALL: dict[str, Any] = dict(
    model_type="mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


# ---- from a config -----------------------------------------------------------------------------------------------------------


def same_weights(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_model_from_a_config_is_seeded_and_fits_the_tokenizer() -> None:
    spec = ModelSpec(config=SMALL)
    first = load_model(spec, tiny.tokenizer(), seed=1)
    torch.rand(7)
    assert same_weights(load_model(spec, tiny.tokenizer(), seed=1), first)
    assert not same_weights(load_model(spec, tiny.tokenizer(), seed=2), first)
    assert (first.config.vocab_size, first.config.pad_token_id, first.config.eos_token_id) == (len(tiny.WORDS), 0, 1)
    assert first.config.bos_token_id is None
    assert load_model(ModelSpec(config=SMALL | {"vocab_size": 64}), tiny.tokenizer()).config.vocab_size == 64
    assert load_model(ModelSpec(config=SMALL, dtype="bfloat16"), tiny.tokenizer()).dtype == torch.bfloat16
    assert load_model(ModelSpec(config=SMALL | {"rope_theta": 77.0})).config.rope_parameters["rope_theta"] == 77.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": None}, "config of a None model: Unrecognized model identifier"),
        ({"model_type": "mistrall"}, "mistrall"),
        ({"hiden_size": 64}, "hiden_size=64 is not a field of it; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": 30}, "RoPE requires an even rotary dimension"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (SMALL | fields).items() if value is not None}
    if "model_type" in fields:
        config = {key: value for key, value in config.items() if key == "model_type"}
    with pytest.raises(UserError, match=message):
        load_model(ModelSpec(config=config))


# ---- from a directory --------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def lora(base: Any, **fields: Any) -> Any:
    torch.manual_seed(3)
    fields = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) | fields
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, ``mixtral``, and ``adapter`` on the dense one."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.model(seed=1).save_pretrained(folder / "dense")
    tiny.model("mixtral", seed=1).save_pretrained(folder / "mixtral")
    lora(load_model(ModelSpec(path=str(folder / "dense")))).save_pretrained(folder / "adapter")
    return folder


def variant(source: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a checkpoint with other weights in it."""
    shutil.copytree(source, to)
    file = next(to.glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return to


def truncated(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    file = next(to.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return to


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_round_trip(kind: str, saved: Path) -> None:
    loaded = load_model(ModelSpec(path=str(saved / kind)))
    assert same_weights(loaded, tiny.model("mixtral" if kind == "mixtral" else "mistral", seed=1))
    assert load_model(ModelSpec(path=str(saved / kind), dtype="bfloat16")).dtype == torch.bfloat16


def test_an_adapter_directory_is_merged_into_its_base(saved: Path, tmp_path: Path) -> None:
    merged = load_model(ModelSpec(path=str(saved / "adapter")))
    assert same_weights(merged, lora(tiny.model(seed=1)).merge_and_unload())
    assert not same_weights(merged, tiny.model(seed=1))
    second = lora(load_model(ModelSpec(path=str(saved / "adapter"))), target_modules=["o_proj"])
    second.peft_config["default"].base_model_name_or_path = str(saved / "adapter")
    second.save_pretrained(tmp_path)
    assert same_weights(load_model(ModelSpec(path=str(tmp_path))), second.merge_and_unload())
    with pytest.raises(UserError, match="quantization=4bit is not possible"):
        load_model(ModelSpec(path=str(saved / "adapter"), quantization="4bit"))


BROKEN: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (
        lambda source, to: variant(source, to, lambda w: {k: w[k] for k in w if k not in (UP, LORA_A)}),
        r"up_proj|lora_A",
    ),
    "shape": (
        lambda source, to: variant(source, to, lambda w: w | {k: torch.zeros(3, 3) for k in (UP, LORA_A) if k in w}),
        "3, 3",
    ),
    "truncated": (truncated, "incomplete metadata|not fully covered"),
}


@pytest.mark.parametrize("what", list(BROKEN))
@pytest.mark.parametrize("kind", ["dense", "adapter"])
def test_incomplete_weights_are_an_error(kind: str, what: str, saved: Path, tmp_path: Path) -> None:
    make, message = BROKEN[what]
    folder = make(saved / kind, tmp_path / "broken")
    with pytest.raises(UserError, match=rf"broken.*({message})"):
        load_model(ModelSpec(path=str(folder)))
    target = lora(tiny.model(seed=1)) if kind == "adapter" else tiny.model(seed=1)
    with pytest.raises(UserError, match=rf"broken.*({message})"):
        restore_weights(target, folder)


def test_weights_left_over_are_an_error_when_restoring(saved: Path, tmp_path: Path) -> None:
    more = {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}
    folder = variant(saved / "dense", tmp_path / "more", lambda w: w | more)
    with pytest.raises(UserError, match=r"unexpected_keys.*layers.7"):
        restore_weights(tiny.model(seed=1), folder)
    folder = variant(saved / "adapter", tmp_path / "more adapter", lambda w: w | more)
    with pytest.raises(UserError, match=r"1 differ, such as .*layers.7"):
        restore_weights(lora(tiny.model(seed=1)), folder)


def test_what_is_no_model(saved: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(saved / "dense", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tiny.model(seed=1).state_dict(), pickled / "pytorch_model.bin")
    unreadable = tmp_path / "unreadable"
    shutil.copytree(saved / "dense", unreadable)
    (unreadable / "config.json").write_text("{")
    for path in (tmp_path / "absent", tmp_path, pickled, unreadable, "nobody/no-such-model"):
        with pytest.raises(UserError, match=r"could not be loaded .*directory with config.json and whole"):
            load_model(ModelSpec(path=str(path)))


def test_what_is_no_adapter(saved: Path, tmp_path: Path) -> None:
    pickled, homeless, unreadable = tmp_path / "pickled", tmp_path / "homeless", tmp_path / "unreadable"
    for folder in (pickled, homeless, unreadable):
        shutil.copytree(saved / "adapter", folder)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    config = json.loads((homeless / "adapter_config.json").read_text())
    (homeless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (unreadable / "adapter_config.json").write_text("{")
    for folder, message in ((pickled, "No such file"), (homeless, "names no base model"), (unreadable, "cannot be read")):
        with pytest.raises(UserError, match=rf"{folder.name}.*{message}"):
            load_model(ModelSpec(path=str(folder)))


def test_four_bits(tmp_path: Path) -> None:
    """A dense model; mixtures of experts are in ``test_experts.py``."""
    tiny.model(seed=1, hidden=64).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), quantization="4bit"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_four_bit_weights_are_not_repacked(tmp_path: Path) -> None:
    """bitsandbytes repacks them at the first forward in eval mode, with rounding, on a CPU that knows AVX512-BF16."""
    tiny.model(seed=1, hidden=64).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path), quantization="4bit"))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu is False  # true or false before, as the CPU is
    layer.support_avx512bf16_for_cpu = True
    add_on_hidden(model)  # what every trainer and teacher calls, also with a model that the user has loaded
    before = layer.weight.clone()
    model.eval()(input_ids=torch.tensor([[1, 2]]))
    assert layer.support_avx512bf16_for_cpu is False and torch.equal(layer.weight, before)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="up_proj: a forward in eval mode has repacked"):
        keep_four_bit_weights(model)


# ---- restoring ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_every_weight_is_restored_in_place(kind: str, saved: Path) -> None:
    name = "mixtral" if kind == "mixtral" else "mistral"
    model = tiny.model(name, seed=2)
    parameters = [id(parameter) for parameter in model.parameters()]
    restore_weights(model, saved / kind)
    assert same_weights(model, tiny.model(name, seed=1))
    assert [id(parameter) for parameter in model.parameters()] == parameters  # the optimizer still holds them
    rounded = tiny.model(name, seed=2).to(torch.bfloat16)
    restore_weights(rounded, saved / kind)
    assert same_weights(rounded, tiny.model(name, seed=1).to(torch.bfloat16))


def test_buffers_that_no_file_holds_stay_as_the_run_has_them(tmp_path: Path) -> None:
    model = tiny.model(seed=1).to(torch.bfloat16).float()  # which has rounded the rotary frequencies
    model.save_pretrained(tmp_path)
    before = model.model.rotary_emb.inv_freq.clone()
    restore_weights(model, tmp_path)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert not torch.equal(tiny.model(seed=1).model.rotary_emb.inv_freq, before)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny.model(seed=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = tiny.model(seed=2, tie_word_embeddings=True)
    restore_weights(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_weights(model, tiny.model(seed=1, tie_word_embeddings=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_restored_and_nothing_else(dtype: torch.dtype, saved: Path) -> None:
    model = lora(tiny.model(seed=1))
    model.add_adapter("reference", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.full_like(parameter, 0.5, dtype=dtype)
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    base = {name: p.clone() for name, p in base_of(model).named_parameters() if "lora" not in name}
    restore_weights(model, saved / "adapter")
    stored = load_file(saved / "adapter" / "adapter_model.safetensors")
    seen = 0
    for name, parameter in model.named_parameters():
        assert parameters[name] == (id(parameter), parameter.requires_grad)
        if ".default." in name:
            assert parameter.dtype == dtype
            assert torch.equal(parameter, stored[name.replace(".default", "")].to(dtype))
            seen += 1
        elif ".reference." in name:
            assert (parameter == 0.5).all()
    assert seen == len(stored)
    assert all(torch.equal(p, base[name]) for name, p in base_of(model).named_parameters() if "lora" not in name)


def test_nothing_to_restore_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its weights cannot be read"):
        restore_weights(tiny.model(), tmp_path)
    with pytest.raises(UserError, match="LoRA adapter cannot be read"):
        restore_weights(lora(tiny.model()), tmp_path)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_an_adapter_that_unties_the_head_of_its_base_is_merged_and_trained_on(saved: str, tmp_path: Path) -> None:
    base = tiny.model(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    merged = load_model(ModelSpec(path=str(tmp_path / "adapter"), dtype="float32"))
    assert all(parameter.requires_grad for parameter in merged.parameters())
