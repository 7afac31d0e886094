"""Tiny random models of many families, from their configs alone, and what the audit of the families runs them on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

V, COLUMNS = 40, 48  # ids of the tokenizer, and columns of the heads

_USUAL: dict[str, Any] = dict(
    vocab_size=COLUMNS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
_DROPOUTS = {
    "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "residual_dropout", "embed_dropout", "resid_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob",
}  # fmt: skip
_GPT: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, n_ctx=128)
_MOE: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
)
_MLA: dict[str, Any] = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, num_key_value_heads=4
)
_DEEPSEEK: dict[str, Any] = _MLA | dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=1,
    num_local_experts=4,
)  # fmt: skip
_MAMBA2: dict[str, Any] = dict(
    mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4, mamba_n_groups=1, mamba_expand=2
)
_LINEAR: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
_VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

# what a family's config needs besides, or instead of, the usual fields
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6),
    "mixtral": _MOE,
    "qwen2": {},
    "qwen2_moe": _MOE,
    "qwen3": {},
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE | _LINEAR,
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=2.0, sliding_window=6),
    "gemma3_text": dict(query_pre_attn_scalar=8, sliding_window=6),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=COLUMNS,
        laurel_rank=4,
        sliding_window=6,
        activation_sparsity_pattern=None,
        final_logit_softcapping=2.0,
    ),
    "gemma4_text": dict(
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=6,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": {},
    "phi3": dict(rope_scaling=None),
    "phimoe": _MOE,
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=2, head_dim=None),
    "falcon_h1": _MAMBA2 | dict(mamba_d_head=8, lm_head_multiplier=0.3),
    "falcon_mamba": dict(state_size=8, conv_kernel=4),
    "mamba": dict(state_size=8, conv_kernel=4),
    "mamba2": dict(state_size=8, conv_kernel=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
    "jamba": _MOE
    | dict(
        mamba_d_state=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "bamba": _MAMBA2 | dict(attn_layer_indices=[1]),
    "zamba2": dict(
        mamba_d_state=8,
        mamba_expand=2,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=4,
        hybrid_layer_ids=[1],
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1,
        num_key_value_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        use_mem_eff_path=False,
    ),
    "nemotron": {},
    "nemotron_h": _MOE
    | _MAMBA2
    | dict(
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=4,
        expand=2,
        layers_block_type=["mamba", "attention"],
    ),
    "gpt2": _GPT,
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "gptj": _GPT | dict(rotary_dim=8),
    "gpt_neox": {},
    "gpt_bigcode": _GPT,
    "gpt_oss": _MOE | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "codegen": _GPT | dict(rotary_dim=8),
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "biogpt": {},
    "stablelm": {},
    "starcoder2": dict(sliding_window=None),
    "persimmon": {},
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(logit_scale=0.25, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "granite": dict(logits_scaling=4.0),
    "granitemoe": _MOE | dict(logits_scaling=4.0),
    "granitemoehybrid": _MOE
    | _MAMBA2
    | dict(logits_scaling=4.0, shared_intermediate_size=32, layer_types=["mamba", "attention"]),
    "olmo": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "olmoe": _MOE,
    "olmo_hybrid": _LINEAR,
    "deepseek_v2": _DEEPSEEK | dict(topk_method="greedy"),
    "deepseek_v3": _DEEPSEEK,
    "glm": dict(partial_rotary_factor=0.5),
    "glm4": dict(partial_rotary_factor=0.5),
    "glm4_moe": _MOE | dict(n_routed_experts=4, n_group=1, topk_group=1, partial_rotary_factor=0.5, first_k_dense_replace=1),
    "exaone4": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "ernie4_5": {},
    "ernie4_5_moe": _MOE | dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "smollm3": {},
    "hunyuan_v1_dense": {},
    "lfm2": dict(layer_types=["conv", "full_attention"], block_ff_dim=64, block_auto_adjust_ff_dim=False),
    "recurrent_gemma": dict(
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=16,
        block_types=["recurrent", "recurrent", "attention"],
        logits_soft_cap=2.0,
    ),
    "minimax": _MOE | dict(layer_types=["linear_attention", "full_attention"], block_size=4),
    "afmoe": _MOE | dict(num_dense_layers=1, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "llama4_text": _MOE
    | dict(
        intermediate_size_mlp=64,
        attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "seed_oss": {},
    "dots1": _MOE
    | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1, norm_topk_prob=True),
    "nanochat": {},
    "apertus": {},
    "arcee": {},
}
# families whose text model sits beside a vision tower; transformers' ForConditionalGeneration classes
WITH_VISION: dict[str, dict[str, Any]] = {
    "mistral3": dict(
        text_config=_USUAL | dict(model_type="mistral"), vision_config=_VISION | dict(model_type="pixtral", head_dim=16)
    ),
    "gemma3": dict(
        text_config=_USUAL | FAMILIES["gemma3_text"] | dict(model_type="gemma3_text"),
        vision_config=_VISION | dict(model_type="siglip_vision_model"), mm_tokens_per_image=4,
    ),
    "gemma4": dict(
        text_config=_USUAL | FAMILIES["gemma4_text"] | dict(model_type="gemma4_text"), vision_config=_VISION, audio_config=None
    ),
    "llama4": dict(
        text_config=_USUAL | FAMILIES["llama4_text"] | dict(model_type="llama4_text"),
        vision_config=_VISION | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
    ),
    "mllama": dict(
        text_config=_USUAL | dict(cross_attention_layers=[1], rope_scaling=None),
        vision_config=_VISION | dict(attention_heads=2, num_global_layers=1, vision_output_dim=64, max_num_tiles=4),
    ),
}  # fmt: skip


def model(family: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random model of a family, in float64 and in eval mode; ``fields`` are of its (text) config."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        if family in WITH_VISION:
            parts = WITH_VISION[family]
            parts = parts | {"text_config": parts["text_config"] | fields}
            return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts)).eval()
        made = AutoModelForCausalLM.from_config(config(family, **fields), dtype=torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    return made.eval()


def config(family: str, **fields: Any) -> PreTrainedConfig:
    """The config of a family's tiny model."""
    wanted = _USUAL | FAMILIES[family] | fields
    made = AutoConfig.for_model(family, **{name: value for name, value in wanted.items() if value is not None})
    for name in vars(made).keys() & _DROPOUTS:
        setattr(made, name, 0.0)
    return made
