"""Sparse teachers: the divergence between two distributions over K named tokens and one bucket for all others, the tail.

It is at most the divergence of the whole distributions (data processing), and the student is free within the tail: there a
token's slope is the tail's, shared out as the student shares its own mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses.divergences import Divergence
from daekit.protocol import Signal, TopK


def bucketed(divergence: Divergence, student_MV: Tensor, ids_MK: Tensor, teacher_MB: Tensor) -> tuple[Tensor, Tensor]:
    """``(value_M, slope_MV)`` of a divergence between buckets.

    Args:
        student_MV: log-probabilities of the student, overwritten.
        ids_MK: the tokens of the first K buckets.
        teacher_MB: log-probabilities of the teacher's buckets: K + 1, or K = V, which leave no tail.
    """
    K = ids_MK.shape[-1]
    named_MK = student_MV.gather(-1, ids_MK)
    if teacher_MB.shape[-1] == K:
        value_M, slope_MB = divergence(named_MK, teacher_MB.clone())
        return value_M, student_MV.scatter_(-1, ids_MK, slope_MB)
    others_MV = student_MV.scatter_(-1, ids_MK, -torch.inf)
    tail_M1 = others_MV.logsumexp(-1, keepdim=True)  # not 1 - sum, which has no digits left where the tail is small
    value_M, slope_MB = divergence(torch.cat([named_MK, tail_M1], -1), teacher_MB.clone())
    within_MV = others_MV.sub_(tail_M1).exp_()  # s_v / s_tail
    return value_M, within_MV.mul_(slope_MB[:, K:]).scatter_(-1, ids_MK, slope_MB[:, :K])


def bucket_log_probs(signal: Signal, vocab_size: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """``[M, B]`` log-probabilities of the buckets of a sparse signal, checked; B = K + 1, or K where K = V leaves no tail.

    A tail whose mass rounds to nothing keeps the smallest normal number, so that every divergence stays finite.

    Raises:
        UserError: a sparse distribution that is none over this vocabulary, or has another temperature than the loss.
    """
    top_k = signal.top_k
    assert top_k is not None
    if signal.voices:
        raise UserError("a teacher's signal has both voices and top_k; it speaks through one of them")
    if top_k.temperature != temperature:
        raise UserError(
            f"temperature: the loss has {temperature} but the teacher's top-k distributions are of temperature "
            f"{top_k.temperature}, and a tail cannot be tempered; use the same"
        )
    _check_ids(top_k, signal.positions_M.numel(), vocab_size)
    log_probs_MK = top_k.log_probs_MK.to(dtype)
    mass_M = log_probs_MK.exp().sum(-1)
    # the error of a sum of probabilities is their entropy (below 16 nats) in units of the rounding of their logarithms
    slack = 1e-5 + 16 * torch.finfo(top_k.log_probs_MK.dtype).eps
    whole = top_k.ids_MK.shape[-1] == vocab_size
    wrong_M = ~(mass_M <= 1 + slack) | ~log_probs_MK.isfinite().all(-1)
    if whole:
        wrong_M |= mass_M < 1 - slack
    if wrong_M.any():
        row = int(wrong_M.nonzero()[0])
        raise UserError(
            f"top_k.log_probs_MK: the probabilities of row {row} sum to {float(mass_M[row]):.6g}; they must be finite "
            f"logarithms of probabilities that sum to {'1, as they name all tokens' if whole else 'at most 1'}"
        )
    if whole:
        return log_probs_MK
    tail_M1 = -torch.expm1(log_probs_MK.logsumexp(-1, keepdim=True))
    return torch.cat([log_probs_MK, tail_M1.clamp_(min=torch.finfo(dtype).tiny).log_()], -1)


def _check_ids(top_k: TopK, positions: int, vocab_size: int) -> None:
    ids_MK, shape = top_k.ids_MK, tuple(top_k.log_probs_MK.shape)
    if tuple(ids_MK.shape) != shape or len(shape) != 2 or shape[0] != positions or not 1 <= shape[1] <= vocab_size:
        raise UserError(
            f"top_k: ids of shape {tuple(ids_MK.shape)} and log-probabilities of shape {shape} for {positions} positions "
            f"and {vocab_size} tokens; both must be [positions, K] with 1 <= K <= {vocab_size}"
        )
    outside_MK = (ids_MK < 0) | (ids_MK >= vocab_size)
    if outside_MK.any():
        raise UserError(
            f"top_k.ids_MK: {int(ids_MK[outside_MK][0])} is no id of the student's tokenizer, which has {vocab_size}: "
            "was the teacher asked with another tokenizer?"
        )
    repeated_M = (ids_MK.sort(-1).values.diff(dim=-1) == 0).any(-1)
    if repeated_M.any():
        row = int(repeated_M.nonzero()[0])
        raise UserError(f"top_k.ids_MK: row {row} names a token twice; its probability would be counted twice")
