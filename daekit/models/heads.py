"""The output head of a model, and logits from it: the vocabulary projection that every score here goes through."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.protocol import OutputHead, Signal


def logit_scale(config: PreTrainedConfig) -> float:
    """Multiplier of the logits that some architectures declare (1 for most).

    The names and their meanings are those that ``trl.trainer.utils.add_fused_lm_head`` reads: ``logit_scale`` (Cohere),
    ``output_multiplier``, ``lm_head_multiplier`` (Falcon-H1), ``logits_scaling`` (Granite divides, HyperCLOVA X multiplies).
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


def output_head(model: nn.Module, vocab_size: int) -> OutputHead:
    """The output head of a causal language model, restricted to the ``vocab_size`` columns that its tokenizer has.

    Args:
        model: a transformers causal language model or a PEFT model around one (the active adapter counts).
        vocab_size: V, the number of ids of the tokenizer; further columns are padding and are never scored.

    Raises:
        UserError: if the head has fewer than V columns, or carries an adapter (its weight alone would be wrong).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    # base_layer: LoRA and its kin; token_adapter: trainable tokens of embeddings that the head is tied to
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
        raise UserError(
            "the output head (lm_head) carries an adapter: the loss multiplies hidden states by the head's weight "
            "directly, so the adapter would be ignored. Remove 'lm_head' from target_modules (use modules_to_save to train it) "
            "and, if it is tied to the embeddings, trainable_token_indices."
        )
    weight: Tensor = head.weight
    if weight.shape[0] < vocab_size:
        raise UserError(
            f"the model's output head has {weight.shape[0]} columns but the tokenizer has {vocab_size} ids: "
            "resize the model's embeddings (model.resize_token_embeddings) or use the tokenizer it was trained with."
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(weight, head.bias, vocab_size, logit_scale(config), softcap)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a projection of ``hidden`` runs in: autocast's where it is on, that of ``hidden`` otherwise."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def head_logits(hidden_NH: Tensor, head: OutputHead) -> Tensor:
    """``[N, V]`` logits in float32 (float64 for float64 hidden states). Materialises N x V values: call it on chunks."""
    dtype = compute_dtype(hidden_NH)
    weight = head.weight[: head.vocab_size].to(dtype)
    bias = None if head.bias is None else head.bias[: head.vocab_size].to(dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden_NH.to(dtype), weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if head.scale != 1.0:
            logits = logits * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def teacher_log_probs(signal: Signal, index: Tensor | slice, temperature: float = 1.0) -> Tensor:
    """``[chunk, V]`` log-probabilities of a signal at temperature T for some of its M positions.

    Several voices: the softmax of the weighted mean of their logits, or the weighted mean of their probabilities.
    """
    scaled = [(voice.weight, head_logits(voice.hidden_MH[index], voice.head) / temperature) for voice in signal.voices]
    if signal.average == "logits":
        return torch.stack([weight * logits for weight, logits in scaled]).sum(0).log_softmax(-1)
    parts = [logits.log_softmax(-1) + math.log(weight) for weight, logits in scaled]
    return torch.stack(parts).logsumexp(0)
