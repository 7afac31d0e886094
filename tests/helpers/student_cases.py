"""Tiny teachers of every family that a student can be cut from, and text for them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from daekit.students.selection import Selection
from daekit.students.shapes import Shape

VOCABULARY = 40
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    max_position_embeddings=64,
    initializer_range=0.3,  # so that everything has a say
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = SIZES | {"num_key_value_heads": 3, "head_dim": 8}
MIXED_LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED_LAYERS}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE),
    "llama-biases-tied": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED | {"head_dim": 16}, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=3, **WINDOW),  # without head_dim
    "qwen3": Qwen3Config(**GROUPED, attention_bias=True, tie_word_embeddings=True, **WINDOW),
    "gpt_neox": GPTNeoXConfig(**SIZES | {"num_attention_heads": 3}),  # head_dim 16, of which 4 are rotated
    "gpt_neox-sequential": GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, rotary_pct=1.0
    ),
}


def teacher(case: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random model in eval mode whose biases and norms are no zeros and ones either."""
    torch.manual_seed(seed)
    config = type(CONFIGS[case])(**copy.deepcopy(CONFIGS[case].to_dict()) | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rows(count: int = 12, seed: int = 0, longest: int = 20) -> list[dict[str, list[int]]]:
    """Random token rows of different lengths."""
    random = np.random.default_rng(seed)
    made = [random.integers(VOCABULARY, size=int(random.integers(longest // 2, longest))).tolist() for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 5) -> torch.Tensor:
    """Of two random sequences of 17 tokens."""
    ids = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits.double()


def silence_channels(model: PreTrainedModel, kept: int) -> None:
    """Make all channels but the first ``kept`` carry nothing, and the mean of the channels zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name and "lm_head" not in name:
                parameter[:, :kept] -= parameter[:, :kept].mean(dim=1, keepdim=True)
                parameter[:, kept:] = 0
            elif any(part in name for part in ("o_proj", "down_proj", "dense.", "dense_4h_to_h")):
                parameter[:kept] -= parameter[:kept].mean(dim=0, keepdim=True)
                parameter[kept:] = 0
            elif "norm" in name and name.endswith("bias"):
                parameter[kept:] = 0


def first_units(config: Any, shape: Shape | None = None) -> Selection:
    """The selection that keeps the first units of everything, in a possible shape; without one, all units."""
    own = Shape.of(config)
    shape = shape or own
    layers, kv_heads = shape.num_hidden_layers, range(shape.num_key_value_heads)
    queries = tuple(kv * own.queries_per_group + query for kv in kv_heads for query in range(shape.queries_per_group))
    return Selection(
        layers=tuple(range(layers)),
        hidden=tuple(range(shape.hidden_size)),
        neurons=(tuple(range(shape.intermediate_size)),) * layers,
        kv_heads=(tuple(kv_heads),) * layers,
        query_heads=(queries,) * layers,
        head_dim=shape.head_dim,
    )
