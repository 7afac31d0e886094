"""Checkpoints that are quantised already, as they come from the hub, and the plain models that their weights stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from daekit.models.loading import load_model
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_BLOCK = 32


def fp8(folder: Path) -> PreTrainedModel:
    """Blocks of 32 x 32 values in float8_e4m3fn with a float32 scale, as of DeepSeek-V3."""
    model, state, plain = _saved(folder, tiny.model(seed=2, hidden=64))
    for name in [name for name in state if name.endswith("proj.weight")]:
        rows, columns = state[name].shape
        blocks = state[name].view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        plain[name] = (packed.float() * scale[:, None, :, None]).view(rows, columns)
        state |= {name: packed.view(rows, columns), f"{name}_scale_inv": scale}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    return _written(folder, model, state, plain, settings)


def mxfp4(folder: Path) -> PreTrainedModel:
    """Experts in 4 bits, 32 values with a power of two as scale, as of gpt-oss."""
    torch.manual_seed(2)
    config = GptOssConfig(
        vocab_size=tiny.PADDED_VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        sliding_window=32, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model, state, plain = _saved(folder, AutoModelForCausalLM.from_config(config))
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        weight_EOI = state.pop(name).transpose(1, 2)
        blocks = weight_EOI.reshape(*weight_EOI.shape[:2], -1, _BLOCK)
        exponent = blocks.abs().amax(-1).log2().floor() - 2
        codes = (blocks[..., None] / 2 ** exponent[..., None, None] - _FP4).abs().argmin(-1)
        values = _FP4[codes] * 2 ** exponent[..., None]
        plain[name] = values.view(weight_EOI.shape).transpose(1, 2).contiguous()
        state[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        state[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _written(folder, model, state, plain, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def bitsandbytes(folder: Path) -> PreTrainedModel:
    """bitsandbytes' nf4, saved after it was quantised; the plain model is the quantised one that was saved."""
    tiny.model(seed=2, hidden=64).save_pretrained(folder / "plain")
    model = load_model(ModelSpec(path=str(folder / "plain"), quantization="4bit", dtype="float32"))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def unreadable(folder: Path, method: str) -> None:
    """A checkpoint of a method whose package is not here; its weights are never looked at."""
    model, state, plain = _saved(folder, tiny.model(seed=2, hidden=64))
    _written(folder, model, state, plain, {"quant_method": method, "bits": 4, "group_size": 64})


def _saved(folder: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Tensor]]:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model, load_file(folder / "model.safetensors"), {}


def _written(
    folder: Path, model: PreTrainedModel, state: dict[str, Tensor], plain: dict[str, Tensor], settings: dict[str, Any]
) -> PreTrainedModel:
    save_file({name: each.contiguous() for name, each in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    model.load_state_dict(plain, strict=False)
    return model
