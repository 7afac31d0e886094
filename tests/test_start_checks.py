"""What is tried on a few tokens before the first step: output heads, numbers, and rows packed together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import add_on_hidden, backbone_of, decoder_layers
from daekit.models.start_checks import require_plain_head, require_rows_apart
from daekit.teachers import EnsembleTeacher, ModelTeacher
from tests.helpers import families, tiny
from tests.helpers.trainer_world import kd, sft

V = len(tiny.WORDS)


def small(family: str, **fields: Any) -> PreTrainedModel:
    """A tiny model of a family in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families.config(family, **fields)).eval()
    add_on_hidden(model)
    return model


# ---- heads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [10.0, 60.0])
@pytest.mark.parametrize("family", ["gemma2", "recurrent_gemma"])
def test_soft_caps_are_known_by_their_names(family: str, cap: float) -> None:
    name = {"gemma2": "final_logit_softcapping", "recurrent_gemma": "logits_soft_cap"}[family]
    require_plain_head(small(family, **{name: cap}), V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [10.0, 60.0])
def test_an_unknown_cap_is_found_at_small_logits(cap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an error of 1e-3 or less on the model's own hidden states, which 2% of them would hide."""
    model = small("recurrent_gemma", logits_soft_cap=cap, initializer_range=0.02).to(dtype)
    monkeypatch.setattr("daekit.models.heads._CAPS", ())
    with pytest.raises(UserError, match="not supported"):
        require_plain_head(model, V)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_head_is_taken_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    model = tiny.model(kind).to(dtype)
    add_on_hidden(model)
    require_plain_head(model, V)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value: float) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(UserError, match="NaN or inf"):
        ModelTeacher(model, V)


# ---- packed rows ------------------------------------------------------------------------------------------------------------

LEAKING = ("gpt_oss", "falcon", "opt", "mpt", "jamba", "minimax")
RAISING = ("lfm2", "bamba")


@pytest.mark.parametrize("family", [*LEAKING, *RAISING])
def test_families_that_cannot_pack_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"packing: student .{family}"):
        require_rows_apart(small(family), "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "ministral"])
def test_rows_that_do_not_see_each_other_are_taken(family: str, dtype: torch.dtype) -> None:
    require_rows_apart(small(family).to(dtype), "student")


def test_a_leak_shows_in_16_bits_and_through_an_adapter() -> None:
    model = get_peft_model(small("opt").to(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(UserError, match="see each other"):
        require_rows_apart(model, "student")


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_the_trainers_look_at_the_student(tmp_path: Any, options: dict[str, Any]) -> None:
    rows = tiny.rows(8)
    sft(tmp_path, rows, student=small("opt"))
    with pytest.raises(UserError, match="packing: student"):
        sft(tmp_path, rows, student=small("opt"), **options)


def test_the_trainers_look_at_every_teacher(tmp_path: Any) -> None:
    plain, leaking = (ModelTeacher(small(family), V, family) for family in ("mistral", "opt"))
    kd(tmp_path, tiny.rows(8), teacher=EnsembleTeacher([plain, plain]), packing=True)
    with pytest.raises(UserError, match="packing: teacher opt"):
        kd(tmp_path, tiny.rows(8), teacher=EnsembleTeacher([plain, leaking]), packing=True)


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_no_balancing_loss(family: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=f"router_aux_loss_coef=0.1: {family}"):
        sft(tmp_path, tiny.rows(8), student=small(family), router_aux_loss_coef=0.1)
    sft(tmp_path, tiny.rows(8), student=small("qwen3_moe"), router_aux_loss_coef=0.1)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("mamba", "all-linear"), ("nemotron_h", "all-linear"), ("phimoe", "all-linear"), ("llama", ["c_attn"])],
)
def test_targets_that_no_adapter_can_have(family: str, targets: Any, tmp_path: Any) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    with pytest.raises(UserError, match="peft_config: target_modules"):
        sft(tmp_path, tiny.rows(8), student=small(family), peft_config=config)
    sft(tmp_path, tiny.rows(8), student=small("mixtral"), peft_config=LoraConfig(target_modules="all-linear"))


# ---- layers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["falcon", "bloom", "mamba", "jamba", "gptj", "mpt", "olmo_hybrid", "opt", "zamba2"])
def test_layers_are_found_by_the_marks_of_transformers(family: str) -> None:
    model = small(family)
    seen = []
    for n, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda _, __, ___, n=n: seen.append(n))
    model(input_ids=torch.arange(8)[None])
    assert seen == list(range(model.config.num_hidden_layers))


@pytest.mark.parametrize("family", list(families.WITH_VISION))
def test_the_text_decoder_beside_a_vision_tower(family: str) -> None:
    model = families.model(family)
    text = set(backbone_of(model).get_decoder().modules())
    layers = decoder_layers(model)
    assert len(layers) == 2 and text.issuperset(layers)
    assert any(module is model.get_input_embeddings() for module in text)
