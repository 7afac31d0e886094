"""Losses of one chunk of tokens, from logits to their gradient: what a GPU kernel may do in one pass.

``chunk_losses`` is the boundary: plain tensors in, values out, the gradient written over the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daekit.losses.divergences import divergence_of, value_factor
from daekit.losses.top_k import Buckets, bucketed
from daekit.models.heads import scale_and_cap_
from daekit.protocol import OutputHead
from daekit.recipe.objective import Objective

Values = tuple[Tensor, Tensor, Tensor]

# Logits of each thread that go through all passes together, 1 MB in float32. CPU milliseconds of a divergence, 512 tokens of a
# vocabulary of 32,000, one thread: jsd whole 315, by 64 tokens 206, 16 163, 8 159, 4 166, 1 204; forward KL whole 74, by 8 41.
_BLOCK_VALUES = 2**18


def chunk_losses_on(device: torch.device, dtype: torch.dtype, sparse: bool = False) -> Callable[..., Values]:
    """``chunk_losses`` for a device: a Triton kernel on CUDA (not for float64 or buckets), torch elsewhere; the same result."""
    if sparse or device.type != "cuda" or dtype == torch.float64:
        return _by_rows
    from daekit.losses.kernels import prediction as kernels  # needs triton

    return kernels.chunk_losses


def chunk_losses(
    student_MV: Tensor,
    teacher: Tensor | Buckets | None,
    labels_M: Tensor,
    objective: Objective,
    head: OutputHead,
    wants_gradient: bool,
) -> Values:
    """Cross-entropy, divergence and their gradient for one chunk of tokens.

    Args:
        student_MV: outputs of the student's linear layer, before scale and soft-capping. Overwritten: with the derivative of
            ``ce_weight * ce + prediction_weight * divergence`` with respect to them where a gradient is wanted.
        teacher: logits ``[M, V]``, scaled and soft-capped, before the temperature, in float32 (float64 for a float64
            student), overwritten. For a sparse teacher its buckets (not on CUDA). None: cross-entropy alone.
        labels_M: the token that each position predicts.
        objective: divergence, temperature and weights.
        head: the student's; scale and soft-capping of its logits.
        wants_gradient: whether ``student_MV`` becomes the gradient.

    Returns:
        ``ce_M`` at temperature 1 and ``divergence_M`` (with its factor T^2; 0 without teacher) in nats, and ``correct_M``:
        whether the label is the student's first choice.
    """
    ce_weight, temperature, softcap = objective.ce_weight, objective.temperature, head.softcap
    exact = torch.promote_types(student_MV.dtype, torch.float32)
    logits = scale_and_cap_(student_MV.to(exact), head.scale, softcap)  # student_MV itself where it is exact
    correct_M = logits.argmax(-1) == labels_M
    capped = logits.clone() if wants_gradient and softcap is not None else None
    # at T = 1 the log-probabilities of both losses are the same and take the place of the logits
    shared = temperature == 1.0 or teacher is None
    log_probs = torch.log_softmax(logits, -1, out=logits) if shared else torch.log_softmax(logits, -1)
    ce_M = -log_probs.gather(-1, labels_M[:, None]).squeeze(-1)
    divergence_M = torch.zeros_like(ce_M)
    grad_logits = None
    if wants_gradient and (ce_weight or teacher is None):
        grad_logits = log_probs.exp() if shared else log_probs.exp_()
        grad_logits.scatter_add_(-1, labels_M[:, None], -torch.ones_like(ce_M)[:, None])
        grad_logits = _scaled_(grad_logits, ce_weight)
    if teacher is not None:
        student = log_probs if shared else _log_softmax_(logits, temperature)
        factor = value_factor(objective)
        if isinstance(teacher, Buckets):
            value_M, grad_divergence = bucketed(divergence_of(objective), student, teacher)
        else:
            value_M, grad_divergence = divergence_of(objective)(student, _log_softmax_(teacher, temperature))
        divergence_M = factor * value_M
        # d(factor D)/d logits = factor * dD/d(logits/T) / T
        grad_divergence = _scaled_(grad_divergence, objective.prediction_weight * factor / temperature)
        grad_logits = grad_divergence if grad_logits is None else grad_divergence.add_(grad_logits)
    if wants_gradient and grad_logits is not None:
        if capped is not None and softcap is not None:
            grad_logits.mul_(capped.div_(softcap).square_().neg_().add_(1))
        student_MV.copy_(_scaled_(grad_logits, head.scale))
    return ce_M, divergence_M, correct_M


def _by_rows(student_MV: Tensor, teacher: Tensor | Buckets | None, labels_M: Tensor, *how: Any) -> Values:
    """``chunk_losses`` of a few rows at a time: these stay in a CPU's cache while all passes go over them."""
    tokens, vocabulary = student_MV.shape
    threads = torch.get_num_threads()
    step = max(threads, threads * _BLOCK_VALUES // vocabulary) if student_MV.device.type == "cpu" else tokens
    parts = []
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        parts.append(chunk_losses(student_MV[rows], None if teacher is None else teacher[rows], labels_M[rows], *how))
    ce_M, divergence_M, correct_M = map(torch.cat, zip(*parts, strict=True))
    return ce_M, divergence_M, correct_M


def _log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at temperature T in place of the logits (softmax reads a row before it writes it)."""
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)


def _scaled_(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)
