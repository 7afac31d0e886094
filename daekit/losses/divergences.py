"""Divergences between two next-token distributions, per token, with their gradient.

Each function takes log-probabilities ``student_MV`` and ``teacher_MV`` (natural logarithm, finite, rows sum to 1) and returns
``(value_M, grad_logits_MV)``: the divergence in nats (``tv``: between 0 and 1) and its derivative with respect to the student's
*logits* (those whose log-softmax is ``student_MV``). Writing g for the derivative with respect to the student's
probabilities s, that is ``s * (g - sum_v s_v g_v)``.

Both arguments are work space: they are overwritten, and the gradient may lie in either. A pass over a chunk costs as much
memory traffic as it reads and writes, so nothing is allocated that an argument can hold. Equal distributions give exactly 0
in value and gradient, and no expression overflows however far the two lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from daekit.recipe.objective import Objective

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), Hinton et al. 2015 (arXiv 1503.02531)."""
    log_ratio = teacher_MV - student_MV
    teacher = teacher_MV.exp_()
    return log_ratio.mul_(teacher).sum(-1), student_MV.exp_().sub_(teacher)


def reverse_kl(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), as in MiniLLM (arXiv 2306.08543) without sampling."""
    log_ratio = torch.sub(student_MV, teacher_MV, out=teacher_MV)
    student = student_MV.exp_()
    return _project(student, log_ratio)


def jsd(student_MV: Tensor, teacher_MV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    ``beta KL(t || m) + (1 - beta) KL(s || m)`` with ``m = beta t + (1 - beta) s``, 0 < beta < 1.
    """
    log_ratio = teacher_MV - student_MV
    mixed = _log_mixture(log_ratio, beta)
    from_teacher = log_ratio.sub_(mixed).mul_(teacher_MV.exp_()).sum(-1)  # KL(t || m)
    # the derivative of beta KL(t||m) and of m inside KL(s||m) cancel to a constant, which the projection removes
    from_student, grad = _project(student_MV.exp_(), mixed.neg_())
    return beta * from_teacher + (1 - beta) * from_student, grad.mul_(1 - beta)


def skew_kl(student_MV: Tensor, teacher_MV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Skew KL of DistiLLM (arXiv 2402.03898): ``KL(t || m)`` with ``m = alpha t + (1 - alpha) s``, 0 < alpha < 1."""
    log_ratio = teacher_MV - student_MV
    mixed = _log_mixture(log_ratio, alpha)
    teacher, student = teacher_MV.exp_(), student_MV.exp_()
    value = log_ratio.sub_(mixed).mul_(teacher).sum(-1)
    # s g = -(1 - alpha) w with w = t s / m. As s sums to 1, w - s sum(w) is excess - s sum(excess) with excess = w - s,
    # which has no rounding where teacher and student agree.
    excess = mixed.neg_().exp_().mul_(teacher).sub_(student)
    grad = excess.addcmul_(student, excess.sum(-1, keepdim=True), value=-1)
    return value, grad.mul_(alpha - 1)


def skew_reverse_kl(student_MV: Tensor, teacher_MV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Skew reverse KL of DistiLLM (arXiv 2402.03898): ``KL(s || m)`` with ``m = (1 - alpha) t + alpha s``, 0 < alpha < 1."""
    log_ratio = torch.sub(teacher_MV, student_MV, out=teacher_MV)
    ratio = _log_mixture(log_ratio, 1 - alpha).neg_()  # log s/m
    student = student_MV.exp_()
    value = (student * ratio).sum(-1)
    # g = log s/m + 1 - alpha s/m; with expm1 the two last are 0 where teacher and student agree, but for a constant
    _, grad = _project(student, torch.expm1(ratio).mul_(-alpha).add_(ratio))
    return value, grad


def tv(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation distance ``1/2 sum |t - s|``."""
    student = student_MV.exp_()
    log_ratio = torch.sub(student, teacher_MV.exp_(), out=teacher_MV)
    value = log_ratio.abs().sum(-1).mul_(0.5)
    _, grad = _project(student, log_ratio.sign_())
    return value, grad.mul_(0.5)


def divergence_name(objective: Objective) -> str:
    """The divergence that an objective means: a skew one without skew is the plain one."""
    plain = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"} if objective.parameter == 0.0 else {}
    return plain.get(objective.divergence, objective.divergence)


def divergence_of(objective: Objective) -> Divergence:
    """The divergence that an objective names, with its parameter."""
    plain: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tv": tv}
    mixed = {"jsd": jsd, "skew_kl": skew_kl, "skew_reverse_kl": skew_reverse_kl}
    name, parameter = divergence_name(objective), objective.parameter
    return plain[name] if name in plain else lambda student_MV, teacher_MV: mixed[name](student_MV, teacher_MV, parameter)


def value_factor(objective: Objective) -> float:
    """What a divergence at temperature T is multiplied by: T^2 (Hinton et al. 2015); 1 for ``tv``, which stays a distance."""
    return 1.0 if objective.divergence == "tv" else objective.temperature**2


def _project(student: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(``sum_v s_v g_v``, ``s * (g - sum_v s_v g_v)``) from probabilities; the latter in place of ``g``."""
    mean = (student * g).sum(-1)
    return mean, g.sub_(mean[:, None]).mul_(student)


def _log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """``log(m / s)`` for ``m = share t + (1 - share) s`` and ``log_ratio = log(t / s)``, 0 < share < 1.

    ``log(1 - share + share e^log_ratio)``, taken about the larger of t and s: no exponential overflows, a ratio of 1 gives 0.
    """
    weight = torch.full_like(log_ratio, share).masked_fill_(log_ratio > 0, 1 - share)
    inner = log_ratio.abs().neg_().expm1_().mul_(weight).log1p_()
    # a share that rounds to 0 or 1 beside the other would make that log1p(-1)
    inner.clamp_(min=math.log(min(share, 1 - share)))
    return inner.add_(log_ratio.clamp(min=0))
