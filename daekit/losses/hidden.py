"""The hidden-state loss: how far the student's hidden states are from its teacher's, in chunks of loss positions.

Per position ``1 - cos(s, t)`` or the mean over channels of ``(s - t)^2``, where s is the student's hidden state, projected by a
learned matrix where the widths differ (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351). The gradient is computed in the
forward pass, so that nothing of the teacher's width outlives its chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daekit.losses.gradients import Computed, with_gradients

_CHUNK = 512  # positions


def hidden_loss(
    student_NH: Tensor, teacher_MH: Tensor, positions_M: Tensor, projection_HH: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """The hidden-state loss of one layer for the positions of one teacher output.

    Args:
        student_NH: The student's hidden states at its N loss positions.
        teacher_MH: The teacher's hidden states at the M positions that its output covers.
        positions_M: Indices of those into the N.
        projection_HH: ``[teacher's width, student's width]``, None for equal widths.
        kind: ``cosine`` or ``mse``.

    Returns:
        The sum over the M positions, which carries the gradient for hidden states and projection; and ``[M]`` the values.
    """
    student_MH = student_NH.index_select(0, positions_M)
    exact = torch.promote_types(torch.float32, student_MH.dtype)

    def compute(wants_hidden: bool, wants_projection: bool) -> Computed:
        value_M = student_MH.new_zeros(len(student_MH), dtype=exact)
        grad_hidden = torch.zeros_like(student_MH) if wants_hidden else None
        grad_projection = torch.zeros_like(projection_HH, dtype=exact) if wants_projection else None  # type: ignore[arg-type]
        matrix = None if projection_HH is None else projection_HH.detach().to(exact)
        with torch.autocast(student_MH.device.type, enabled=False):
            for start in range(0, len(student_MH), _CHUNK):
                at = slice(start, start + _CHUNK)
                hidden, target = student_MH[at].to(exact), teacher_MH[at].to(exact)
                image = hidden if matrix is None else hidden @ matrix.T
                value_M[at], grad_image = _COMPARISONS[kind](image, target)
                if grad_projection is not None:
                    grad_projection.addmm_(grad_image.T, hidden)
                if grad_hidden is not None:
                    grad_hidden[at] = (grad_image if matrix is None else grad_image @ matrix).to(grad_hidden.dtype)
        return value_M.sum(dtype=torch.float64).to(exact), [value_M], [grad_hidden, grad_projection]

    loss, value_M = with_gradients(compute, student_MH, projection_HH)
    return loss, value_M


def _cosine(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - cos`` per row, and its derivative with respect to the image: ``(cos * s / |s| - t / |t|) / |s|``."""
    tiny = torch.finfo(image.dtype).tiny  # a hidden state of zeros has no direction: cosine 0, no gradient
    length = image.norm(dim=-1, keepdim=True).clamp(min=tiny)
    direction, wanted = image / length, target / target.norm(dim=-1, keepdim=True).clamp(min=tiny)
    cosine = (direction * wanted).sum(-1, keepdim=True)
    grad_image = (cosine * direction - wanted) / length
    return 1 - cosine.squeeze(-1), torch.where(length > tiny, grad_image, 0.0)


def _mse(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over channels of the squared difference, and its derivative."""
    difference = image - target
    return difference.square().mean(-1), difference * (2 / image.shape[-1])


_COMPARISONS = {"cosine": _cosine, "mse": _mse}
