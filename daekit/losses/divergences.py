"""Divergences between two next-token distributions, per token, with their gradient.

Each function takes log-probabilities ``student_MV`` and ``teacher_MV`` (natural logarithm, rows sum to 1) and returns
``(value_M, slope_MV)``: the divergence in nats and its derivative with respect to the student's *logits* (those whose
log-softmax is ``student_MV``). Writing g for the derivative with respect to the student's probabilities s, that is
``s * (g - sum_v s_v g_v)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from daekit.errors import UserError

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), Hinton et al. 2015 (arXiv 1503.02531)."""
    teacher = teacher_MV.exp()
    value = (teacher * (teacher_MV - student_MV)).sum(-1)
    return value, student_MV.exp().sub_(teacher)


def reverse_kl(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), as in MiniLLM (arXiv 2306.08543) without sampling."""
    student = student_MV.exp()
    ratio = student_MV - teacher_MV
    value = (student * ratio).sum(-1)
    return value, student * (ratio - value[:, None])


def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    ``beta KL(t || m) + (1 - beta) KL(s || m)`` with ``m = beta t + (1 - beta) s``, 0 < beta < 1.
    """
    if not 0.0 < beta < 1.0:
        raise UserError(f"beta: {beta} is not between 0 and 1; its limits 0 and 1 are forward_kl and reverse_kl, scaled")

    def divergence(student_MV: Tensor, teacher_MV: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = student_MV.exp(), teacher_MV.exp()
        mixture = torch.logaddexp(student_MV + _log(1 - beta), teacher_MV + _log(beta))
        ratio = student_MV - mixture
        value = beta * (teacher * (teacher_MV - mixture)).sum(-1) + (1 - beta) * (student * ratio).sum(-1)
        # the derivative of beta KL(t||m) and of m inside KL(s||m) cancel to a constant, which the projection removes
        slope = student * (ratio - (student * ratio).sum(-1, keepdim=True))
        return value, (1 - beta) * slope

    return divergence


def divergence(name: str, beta: float) -> Divergence:
    """The divergence called ``forward_kl``, ``reverse_kl`` or ``jsd`` (``beta`` is for ``jsd`` only)."""
    named: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
    if name == "jsd":
        return jsd(beta)
    if name not in named:
        raise UserError(f"divergence: {name!r} is unknown; choose forward_kl, reverse_kl or jsd")
    return named[name]


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())
