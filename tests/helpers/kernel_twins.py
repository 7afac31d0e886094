"""What the Triton kernels compute, once more: float64, everything stored, autograd. Shares no code with daekit's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from daekit.protocol import AttentionLayer


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over the last axis of p log(p / q), where 0 log 0 is 0."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def divergence(name: str, log_s: Tensor, log_t: Tensor, parameter: float) -> Tensor:
    s, t = log_s.exp(), log_t.exp()

    def log_mix(weight_t: float) -> Tensor:
        return torch.logaddexp(log_t + torch.tensor(weight_t).double().log(), log_s + torch.tensor(1 - weight_t).double().log())

    if name == "forward_kl":
        return kl(t, log_t, log_s)
    if name == "reverse_kl":
        return kl(s, log_s, log_t)
    if name == "jsd":
        return parameter * kl(t, log_t, log_mix(parameter)) + (1 - parameter) * kl(s, log_s, log_mix(parameter))
    if name == "skew_kl":
        return kl(t, log_t, log_mix(parameter))
    if name == "skew_reverse_kl":
        return kl(s, log_s, log_mix(1 - parameter))
    assert name == "tv"
    return 0.5 * (s - t).abs().sum(-1)


def chunk_losses(
    student: Tensor, teacher: Tensor | None, labels: Tensor, name: str, parameter: float, temperature: float,
    ce_weight: float, prediction_weight: float, softcap: float | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ce, divergence, correct, gradient of the weighted sum for ``student``)."""
    student = student.detach().cpu().double().requires_grad_()
    labels = labels.cpu()
    logits = scale * student
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ce = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    value = torch.zeros_like(ce)
    if teacher is not None:
        factor = 1.0 if name == "tv" else temperature**2
        log_t = (teacher.cpu().double() / temperature).log_softmax(-1)
        value = factor * divergence(name, (logits / temperature).log_softmax(-1), log_t, parameter)
    (ce_weight * ce + prediction_weight * value).sum().backward()
    first_largest = torch.tensor([row.tolist().index(max(row.tolist())) for row in logits])
    return ce.detach(), value.detach(), first_largest == labels, student.grad


def attention_rows(query: Tensor, key: Tensor, offsets: Tensor, scaling: float, window: int | None) -> Tensor:
    """``[A, count, length]`` log of the attention weights of queries ``[count, A, D]`` over keys ``[G, length, D]``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[0], dim=0)
    scores = scaling * torch.einsum("nad,atd->ant", query, key)
    distance = offsets[:, None] - torch.arange(key.shape[1])
    allowed = (distance >= 0) & (distance < (window or key.shape[1]))
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def attention_kl(
    student: AttentionLayer, teacher: AttentionLayer, pairs: Tensor, offsets: Tensor
) -> tuple[dict[int, float], Tensor, Tensor]:
    """Value of each covered query, and the gradients of their sum for the student's queries and keys."""
    query, key = (x.detach().cpu().double().requires_grad_() for x in (student.query_NAD, student.key_BGTD))
    query_t, key_t = teacher.query_NAD.cpu().double(), teacher.key_BGTD.cpu().double()
    values: dict[int, float] = {}
    total = (query.sum() + key.sum()) * 0.0
    for n, m, count, b, start, b_t, start_t, length in pairs.tolist():
        offset = offsets.cpu()[n : n + count]
        keys, keys_t = key[b, :, start : start + length], key_t[b_t, :, start_t : start_t + length]
        log_s = attention_rows(query[n : n + count], keys, offset, student.scaling, student.window)
        log_t = attention_rows(query_t[m : m + count], keys_t, offset, teacher.scaling, teacher.window)
        # 0 for what both forbid, and a safe stand-in so that autograd meets no infinity
        value = kl(log_t.exp(), log_t, log_s.masked_fill(log_t == -torch.inf, 0.0)).sum(0)
        values |= dict(zip(range(n, n + count), value.tolist(), strict=True))
        total = total + value.sum()
    total.backward()
    return values, query.grad, key.grad
