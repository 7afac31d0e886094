"""Sparse teachers: the divergence between two distributions over K named tokens and one bucket for all others, the tail.

It is at most the divergence of the whole distributions (data processing), and the student is free within the tail: there a
token's gradient is the tail's, shared out as the student shares its own mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses.divergences import Divergence
from daekit.protocol import TeacherOutput, TopK
from daekit.recipe.objective import Objective


@dataclass(frozen=True)
class Buckets:
    """A sparse teacher's log-probabilities at M positions: of K named tokens, and of the tail unless K = V leaves none."""

    ids_MK: Tensor
    log_probs_MB: Tensor

    def __getitem__(self, rows: slice) -> Buckets:
        return Buckets(self.ids_MK[rows], self.log_probs_MB[rows])


def bucketed(divergence: Divergence, student_MV: Tensor, teacher: Buckets) -> tuple[Tensor, Tensor]:
    """``(value_M, grad_logits_MV)`` of a divergence between buckets; the student's log-probabilities are overwritten."""
    ids_MK, teacher_MB = teacher.ids_MK, teacher.log_probs_MB.clone()
    K = ids_MK.shape[-1]
    named_MK = student_MV.gather(-1, ids_MK)
    if teacher_MB.shape[-1] == K:
        value_M, grad_MB = divergence(named_MK, teacher_MB)
        return value_M, student_MV.scatter_(-1, ids_MK, grad_MB)
    others_MV = student_MV.scatter_(-1, ids_MK, -torch.inf)
    tail_M1 = others_MV.logsumexp(-1, keepdim=True)  # not 1 - sum, which has no digits left where the tail is small
    value_M, grad_MB = divergence(torch.cat([named_MK, tail_M1], -1), teacher_MB)
    within_MV = others_MV.sub_(tail_M1).exp_()  # s_v / s_tail
    return value_M, within_MV.mul_(grad_MB[:, K:]).scatter_(-1, ids_MK, grad_MB[:, :K])


def bucket_log_probs(output: TeacherOutput, vocab_size: int, objective: Objective, dtype: torch.dtype) -> Tensor:
    """``[M, B]`` log-probabilities of the buckets of a sparse output, checked; B = K + 1, or K where K = V leaves no tail.

    A tail whose mass rounds to nothing keeps the smallest normal number, so that every divergence stays finite. So does a
    named token of probability 0 (one that was not among drawn tokens), whose share of forward KL and of its gradient is then
    below the rounding of any other.

    Raises:
        UserError: a sparse distribution that is none over this vocabulary, has another temperature than the loss, is stored in
            so few bits that its tail is not known, or gives a named token the probability 0 where that is infinitely far away.
    """
    top_k = output.top_k
    assert top_k is not None
    if output.members:
        raise UserError("a teacher's output has both members and top_k; give one of them")
    if top_k.temperature != objective.temperature:
        raise UserError(
            f"temperature: the loss has {objective.temperature} but the teacher's top-k distributions are of temperature "
            f"{top_k.temperature}, and a tail cannot be tempered; use the same"
        )
    _check_ids(top_k, output.positions_M.numel(), vocab_size)
    whole = top_k.ids_MK.shape[-1] == vocab_size
    _check_precision(top_k, whole)
    log_probs_MK = top_k.log_probs_MK.to(dtype)
    tail_M = top_k.tail_log_mass_M
    buckets_MB = log_probs_MK if tail_M is None else torch.cat([log_probs_MK, tail_M.to(dtype)[:, None]], -1)
    mass_M = buckets_MB.exp().sum(-1)
    # the error of a sum of probabilities is their entropy (below 16 nats) in units of the rounding of their logarithms
    slack = 1e-5 + 16 * torch.finfo(top_k.log_probs_MK.dtype).eps
    complete = whole or tail_M is not None
    zero_MK = log_probs_MK.isneginf() & complete
    wrong_M = ~(mass_M <= 1 + slack) | ~(log_probs_MK.isfinite() | zero_MK).all(-1)
    if complete:
        wrong_M |= mass_M < 1 - slack
    if wrong_M.any():
        row = int(wrong_M.nonzero()[0])
        wanted = "1, with that of the tail" if tail_M is not None else "1, as they name all tokens" if whole else "at most 1"
        raise UserError(
            f"top_k.log_probs_MK: the probabilities of row {row} sum to {float(mass_M[row]):.6g}; they must be finite "
            f"logarithms of probabilities that sum to {wanted}"
        )
    if objective.divergence != "forward_kl" and complete and buckets_MB.isneginf().any():
        raise UserError(
            f"divergence: {objective.divergence} with a teacher that gives tokens the probability 0 (drawn tokens, labels); "
            "they give forward_kl only. Use it, or the teacher's most likely tokens"
        )
    if whole:
        return log_probs_MK.masked_fill(zero_MK, math.log(torch.finfo(dtype).tiny))
    if tail_M is not None:  # the named probabilities are rounded: together with the tail they become a distribution again
        buckets_MB = buckets_MB.clamp(min=math.log(torch.finfo(dtype).tiny))
        return buckets_MB - buckets_MB.logsumexp(-1, keepdim=True)
    tail_M1 = -torch.expm1(log_probs_MK.logsumexp(-1, keepdim=True))
    return torch.cat([log_probs_MK, tail_M1.clamp_(min=torch.finfo(dtype).tiny).log_()], -1)


def _check_precision(top_k: TopK, whole: bool) -> None:
    """A tail by subtraction is only rounding where K tokens hold nearly all mass (16 bits: errors of reverse KL up to 200%)."""
    stored, tail_M = top_k.log_probs_MK, top_k.tail_log_mass_M
    if stored.dtype == torch.bfloat16 or (stored.dtype == torch.float16 and tail_M is None and not whole):
        raise UserError(
            f"top_k.log_probs_MK: {stored.dtype} is too coarse (bfloat16 steps by 6% of a small probability, and with 16-bit "
            "log-probabilities the tail's mass cannot be had by subtraction); keep them in float32, or in float16 and give the "
            "logarithm of the tail's mass, taken before rounding, as tail_log_mass_M in float32"
        )
    if tail_M is None:
        return
    if whole or tail_M.dtype not in (torch.float32, torch.float64) or tail_M.shape != stored.shape[:1] or tail_M.isnan().any():
        raise UserError(
            f"top_k.tail_log_mass_M: {tail_M.dtype} of shape {tuple(tail_M.shape)} for {len(stored)} positions; it must be one "
            "float32 logarithm for each, and None where K names all tokens"
        )


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
