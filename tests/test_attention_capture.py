"""What is shown of a model's attention, what is refused, and that the model is as before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PreTrainedModel, Qwen3NextConfig

from daekit.errors import UserError
from daekit.models import attention_capture
from daekit.models.attention_capture import AttentionCall, capture_attention, require_row_mask
from daekit.models.backbone import add_on_hidden
from daekit.models.features import states_and_features
from daekit.protocol import Batch, FeatureSpec
from tests.helpers import tiny
from tests.helpers.trainer_world import four_bit, gradients, kd, logged, lora

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def batch(ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> Batch:
    rows = torch.where(mask != 0, torch.arange(len(ids))[:, None], -1)
    labels = torch.where(mask != 0, ids, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # the first token of a row is predicted by nothing
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, rows, ("a",) * len(ids))


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_model_runs_as_before_and_shows_its_own_attention(kind: str) -> None:
    model = tiny.model(kind, 1).eval()
    calls: list[AttentionCall] = []
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    with capture_attention(model, calls.append):
        shown = model(input_ids=IDS, attention_mask=MASK).logits
        assert model.config._attn_implementation == "daekit_sdpa"
    assert torch.equal(shown, expected)
    assert model.config._attn_implementation == "sdpa"
    count = len(calls)
    model(input_ids=IDS, attention_mask=MASK)
    assert len(calls) == count == 2
    model.set_attn_implementation("eager")
    maps = model(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
    for call, whole in zip(calls, maps, strict=True):
        key = call.key_BGTD.repeat_interleave(2, dim=1)
        score = call.scaling * call.query_BATD @ key.transpose(2, 3)
        weights = score.masked_fill(~call.mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[1, :, :4], whole[1, :, :4])  # queries of padding are nobody's


def test_nested_probes_and_models_that_share_a_config() -> None:
    outer_model = tiny.model(seed=1)
    other = AutoModelForCausalLM.from_config(outer_model.config)
    outer: list[AttentionCall] = []
    inner: list[AttentionCall] = []
    with capture_attention(outer_model, outer.append):
        other(input_ids=IDS)  # same config, no probe of its own
        assert not outer
        with capture_attention(outer_model, inner.append):
            outer_model(input_ids=IDS)
        outer_model(input_ids=IDS)
    assert len(outer) == len(inner) == 2
    assert outer_model.config._attn_implementation == "sdpa"


def test_restored_after_an_error() -> None:
    model = tiny.model(seed=1)

    def fail(_: AttentionCall) -> None:
        raise ValueError("in the probe")

    with pytest.raises(ValueError, match="in the probe"), capture_attention(model, fail):
        model(input_ids=IDS)
    assert model.config._attn_implementation == "sdpa"
    assert not any(vars(module).get(attention_capture._OBSERVER) for module in model.modules())
    model(input_ids=IDS)


# ---- the mask of the model itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("mask", [MASK, MASK.flip(1), torch.ones_like(MASK)], ids=["right", "left", "none"])
def test_masks_of_padding_and_windows_are_as_assumed(mask: torch.Tensor, window: int | None) -> None:
    model = tiny.model(seed=1, sliding_window=window)
    seen = batch(IDS, mask)
    calls: list[AttentionCall] = []
    with capture_attention(model, calls.append):
        model(input_ids=IDS, attention_mask=mask)
    for call in calls:
        require_row_mask(call, seen)
        assert call.window == window
    with pytest.raises(UserError, match="mask is not causal"):
        require_row_mask(replace(calls[0], window=2), seen)


def test_rows_that_see_each_other_are_an_error() -> None:
    """Two documents in one sequence whose positions run on: the model looks across, the loss would not."""
    model = tiny.model(seed=1)
    ids = IDS[:1]
    rows = torch.tensor([[0, 0, 0, 1, 1, 1]])
    packed = Batch({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, ids, rows, ("a", "a"))
    across = replace(packed, inputs={"input_ids": ids, "position_ids": torch.arange(6)[None]})
    spec = FeatureSpec(model.config, attention="uniform")
    add_on_hidden(model)
    states_and_features(model, packed, spec)
    with pytest.raises(UserError, match="mask is not causal within the row"):
        states_and_features(model, across, spec)


# ---- attention that is not a causal softmax ----------------------------------------------------------------------------


def family(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


COMMON: dict[str, Any] = dict(
    vocab_size=tiny.PADDED_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def test_sinks_and_capped_scores_are_refused(tmp_path: Any) -> None:
    for config in (GptOssConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1), Gemma2Config(**COMMON)):
        with pytest.raises(UserError, match="attention"):
            kd(tmp_path, tiny.rows(4), tiny.model(seed=1), family(config), attention_weight=1.0, max_steps=1).train()
    model = tiny.model(seed=1)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.sinks = torch.zeros(4)
    with pytest.raises(UserError, match="MistralAttention: its attention has sinks"), capture_attention(model, print):
        model(input_ids=IDS)


def test_linear_attention_is_refused_where_it_is_named(tmp_path: Any) -> None:
    """And left out by ``uniform``, which is the same as naming the softmax layers."""
    config = Qwen3NextConfig(
        **COMMON, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    teacher = family(config)
    options: dict[str, Any] = {"attention_weight": 1.0, "max_steps": 1}
    with pytest.raises(UserError, match=r"attention of layers \[0\] cannot be captured"):
        kd(tmp_path, tiny.rows(4), tiny.model(seed=1), teacher, attention_layers=[[1, 0]], **options)
    values = []
    for layers in ("uniform", [[0, 1], [1, 1]]):
        trainer = kd(tmp_path, tiny.rows(4), tiny.model(seed=1), teacher, attention_layers=layers, **options)
        trainer.train()
        values.append(logged(trainer, "attention_kl")[0])
    assert values[0] == values[1] > 0


# ---- quantised weights -------------------------------------------------------------------------------------------------


def test_qlora_student(tmp_path: Any) -> None:
    """A 4-bit base: the attention loss alone reaches the adapters of queries and keys, and nothing else."""
    tiny.model(seed=1, hidden=64).save_pretrained(tmp_path / "base")
    options = {"attention_weight": 1.0, "prediction_weight": 0.0, "max_steps": 1}
    teacher = tiny.model(seed=2)
    trainer = kd(tmp_path / "run", tiny.rows(8), four_bit(tmp_path / "base"), teacher, peft_config=lora(), **options)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, so that nothing would reach lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    batch_of = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.accelerator.gradient_state._reset_state()
    with trainer.until_backward():
        trainer.compute_loss(trainer.model.train(), batch_of).backward()
    reached = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()}
    last = trainer.model.config.num_hidden_layers - 1
    assert gradients(trainer.model).isfinite().all()
    assert {name for name in reached if f"layers.{last}." in name} == {
        name
        for name, p in trainer.model.named_parameters()
        if f"layers.{last}." in name and ("q_proj" in name or "k_proj" in name) and p.requires_grad
    }
