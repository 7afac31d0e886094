"""The terms of one chunk of tokens, from logits to slopes: what a GPU kernel may do in one pass.

``chunk_terms`` is the boundary: plain tensors and numbers in, values out, slopes written over the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from daekit.losses import divergences
from daekit.losses.top_k import bucketed
from daekit.models.heads import scale_and_cap_

Values = tuple[Tensor, Tensor, Tensor]


def chunk_terms(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    divergence: str,
    parameter: float,
    temperature: float,
    ce_weight: float,
    prediction_weight: float,
    softcap: float | None,
    scale: float,
    wants_gradient: bool,
) -> Values:
    """Cross-entropy, divergence and their slopes for one chunk of tokens.

    Args:
        student_MV: outputs of the student's linear layer, before scale and soft-capping. Overwritten: with the derivative of
            ``ce_weight * ce + prediction_weight * divergence`` with respect to them where a gradient is wanted.
        teacher_MV: the teacher's logits, scaled and soft-capped, before the temperature, in float32 (float64 for a float64
            student); None: cross-entropy alone. Overwritten.
        labels_M: the token that each position predicts.
        divergence: its name.
        parameter: beta of ``jsd``, skew_alpha of the skew divergences.
        temperature: T.
        softcap: of the student's logits, None for most models.
        scale: of the student's logits.

    Returns:
        ``ce_M`` at temperature 1 and ``divergence_M`` (with its factor T^2; 0 without teacher) in nats, and ``correct_M``:
        whether the label is the student's first choice.
    """

    def compare(student_log_probs_MV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_log_probs_MV = _log_softmax_(teacher_MV, temperature)  # type: ignore[arg-type]
        return divergences.divergence(divergence, parameter)(student_log_probs_MV, teacher_log_probs_MV)

    factor = divergences.value_factor(divergence, temperature)
    weights = ce_weight, prediction_weight
    against = None if teacher_MV is None else compare
    return _terms(student_MV, against, labels_M, factor, temperature, weights, softcap, scale, wants_gradient)


def chunk_terms_on(device: torch.device, dtype: torch.dtype) -> Callable[..., Values]:
    """``chunk_terms`` for a device: a Triton kernel on CUDA (but for float64), torch elsewhere; the same result."""
    if device.type != "cuda" or dtype == torch.float64:
        return chunk_terms
    from daekit.losses.kernels import prediction as kernels  # needs triton

    return kernels.chunk_terms


def chunk_terms_top_k(
    student_MV: Tensor,
    ids_MK: Tensor,
    teacher_MB: Tensor,
    labels_M: Tensor,
    divergence: str,
    parameter: float,
    temperature: float,
    ce_weight: float,
    prediction_weight: float,
    softcap: float | None,
    scale: float,
    wants_gradient: bool,
) -> Values:
    """As ``chunk_terms``, with a sparse teacher: tokens ``ids_MK`` and the log-probabilities ``teacher_MB`` of its buckets."""

    def compare(student_log_probs_MV: Tensor) -> tuple[Tensor, Tensor]:
        named = divergences.divergence(divergence, parameter)
        return bucketed(named, student_log_probs_MV, ids_MK, teacher_MB)

    factor = divergences.value_factor(divergence, temperature)
    weights = ce_weight, prediction_weight
    return _terms(student_MV, compare, labels_M, factor, temperature, weights, softcap, scale, wants_gradient)


def _terms(
    student_MV: Tensor,
    compare: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    labels_M: Tensor,
    factor: float,
    temperature: float,
    weights: tuple[float, float],
    softcap: float | None,
    scale: float,
    wants_gradient: bool,
) -> Values:
    ce_weight, prediction_weight = weights
    exact = torch.promote_types(student_MV.dtype, torch.float32)
    logits = scale_and_cap_(student_MV.to(exact), scale, softcap)  # student_MV itself where it is exact
    correct_M = logits.argmax(-1) == labels_M
    capped = logits.clone() if wants_gradient and softcap is not None else None
    # at T = 1 the log-probabilities of both terms are the same and take the place of the logits
    shared = temperature == 1.0 or compare is None
    log_probs = torch.log_softmax(logits, -1, out=logits) if shared else torch.log_softmax(logits, -1)
    ce_M = -log_probs.gather(-1, labels_M[:, None]).squeeze(-1)
    divergence_M = torch.zeros_like(ce_M)
    slope = None
    if wants_gradient and (ce_weight or compare is None):
        slope = log_probs.exp() if shared else log_probs.exp_()
        slope.scatter_add_(-1, labels_M[:, None], -torch.ones_like(ce_M)[:, None])
        slope = _scaled_(slope, ce_weight)
    if compare is not None:
        student = log_probs if shared else _log_softmax_(logits, temperature)
        value_M, pull = compare(student)
        divergence_M = factor * value_M
        # d(factor D)/d logits = factor * dD/d(logits/T) / T
        pull = _scaled_(pull, prediction_weight * factor / temperature)
        slope = pull if slope is None else pull.add_(slope)
    if wants_gradient and slope is not None:
        if capped is not None and softcap is not None:
            slope.mul_(capped.div_(softcap).square_().neg_().add_(1))
        student_MV.copy_(_scaled_(slope, scale))
    return ce_M, divergence_M, correct_M


def _log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at temperature T in place of the logits (softmax reads a row before it writes it)."""
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)


def _scaled_(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)
