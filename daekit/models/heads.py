"""The output head of a model, and logits from it: the vocabulary projection that every score here goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.models.sharded import shape_of
from daekit.protocol import Member, OutputHead, TeacherOutput

# one thing under three names: Gemma's, RecurrentGemma's, xLSTM's
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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

    Further columns are padding and are never scored. Of a PEFT model the active adapter counts.

    Raises:
        UserError: if the head has fewer columns than V (than ``V.least`` of a ``VocabularySize``), carries an adapter (its
            weight alone would be wrong), or is offloaded.
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
    if weight.is_meta:
        raise UserError(
            "the output head is on the meta device (offloaded by accelerate): the loss multiplies by its weight directly, "
            "which would give garbage. Keep lm_head on a device in device_map, or give the model to a ModelTeacher, which does."
        )
    columns = shape_of(weight)[0]
    if columns < getattr(vocab_size, "least", vocab_size):
        raise UserError(
            f"the model's output head has {columns} columns but the tokenizer has {vocab_size} ids: "
            "resize the model's embeddings (model.resize_token_embeddings) or use the tokenizer it was trained with."
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    caps = [cap for name in _CAPS if (cap := getattr(config, name, None))]
    return OutputHead(weight, head.bias, min(int(vocab_size), columns), logit_scale(config), caps[0] if caps else None)


def common_columns(head: OutputHead, outputs: Sequence[TeacherOutput]) -> tuple[OutputHead, list[TeacherOutput]]:
    """A student's head and its teachers' outputs on the columns that all heads have; ids beyond: see ``VocabularySize``."""
    columns = min([head.vocab_size, *(member.head.vocab_size for output in outputs for member in output.members)])

    def restricted(member: Member) -> Member:
        return replace(member, head=replace(member.head, vocab_size=columns))

    return replace(head, vocab_size=columns), [replace(each, members=tuple(map(restricted, each.members))) for each in outputs]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a projection of ``hidden`` runs in: autocast's where it is on, that of ``hidden`` otherwise."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def in_dtype(head: OutputHead, dtype: torch.dtype) -> OutputHead:
    """The V scored rows of the head in the dtype of its matrix products; without a copy where they have it already."""
    bias = None if head.bias is None else head.bias[: head.vocab_size].to(dtype)
    return replace(head, weight=head.weight[: head.vocab_size].to(dtype), bias=bias)


def project(hidden_NH: Tensor, head: OutputHead, out_NV: Tensor | None = None) -> Tensor:
    """``[N, V]`` outputs of the linear layer in the compute dtype, before scale and soft-capping."""
    head = in_dtype(head, compute_dtype(hidden_NH))
    hidden_NH = hidden_NH.to(head.weight.dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if head.bias is None:
            return torch.mm(hidden_NH, head.weight.T, out=out_NV)
        return torch.addmm(head.bias, hidden_NH, head.weight.T, out=out_NV)


def scale_and_cap_(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap * tanh(scale * logits / softcap)`` in place."""
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def head_logits(hidden_NH: Tensor, head: OutputHead, out_NV: Tensor | None = None) -> Tensor:
    """``[N, V]`` logits in float32 (float64 for float64 hidden states), in ``out_NV`` if given; without gradient.

    Materialises N x V values: call it on chunks.
    """
    dtype = compute_dtype(hidden_NH)
    exact = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        linear = project(hidden_NH, head, out_NV if dtype == exact else None)
        logits = linear.to(exact) if out_NV is None or linear is out_NV else out_NV.copy_(linear)
        return scale_and_cap_(logits, head.scale, head.softcap)


def teacher_logits(output: TeacherOutput, index: Tensor | slice, temperature: float, out_MV: Tensor | None = None) -> Tensor:
    """``[chunk, V]`` logits whose softmax at temperature T is the distribution of an output, for some of its M positions.

    Several members: the weighted mean of their logits, or T times the logarithm of the weighted mean of their probabilities.
    """
    first, *others = output.members
    total = head_logits(first.hidden_MH[index], first.head, out_MV)
    if not others:
        return total
    if output.average == "logits":
        total.mul_(first.weight)
        for member in others:
            total.add_(head_logits(member.hidden_MH[index], member.head), alpha=member.weight)
        return total
    total = total.div_(temperature).log_softmax(-1).add_(math.log(first.weight))
    for member in others:
        part = head_logits(member.hidden_MH[index], member.head).div_(temperature).log_softmax(-1)
        torch.logaddexp(total, part.add_(math.log(member.weight)), out=total)
    return total.mul_(temperature)


def teacher_log_probs(output: TeacherOutput, index: Tensor | slice, temperature: float = 1.0) -> Tensor:
    """``[chunk, V]`` log-probabilities of an output's members at temperature T for some of its M positions."""
    return teacher_logits(output, index, temperature).div_(temperature).log_softmax(-1)
