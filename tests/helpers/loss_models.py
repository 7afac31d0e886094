"""Tiny models and random batches for the loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig

from daekit.protocol import Batch

_TINY = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    initializer_range=0.3, attn_implementation="eager", experts_implementation="eager",
)  # fmt: skip


def tiny_model(seed: int, kind: str = "mistral", vocab_size: int = 48, **fields: Any) -> Any:
    torch.manual_seed(seed)
    fields = _TINY | dict(vocab_size=vocab_size) | fields
    config = MixtralConfig(**fields, num_local_experts=4) if kind == "mixtral" else MistralConfig(**fields)
    return AutoModelForCausalLM.from_config(config)


def random_batch(vocab: int, size: int = 3, length: int = 9, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (size, length), generator=generator)
    labels = torch.where(torch.rand(size, length, generator=generator) < 0.5, ids, -100)
    rows = torch.arange(size)[:, None].expand(size, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, rows, ("general",) * size)
