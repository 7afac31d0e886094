"""The prediction loss: CE with the labels and a divergence from the teachers, over kept positions, in chunks.

Logits exist for one chunk of tokens at a time, in both models. The gradient with respect to the hidden states and the head
is computed in the forward pass, while the chunk's logits are there, so that nothing of size N x V outlives its chunk.
Memory beyond the inputs: N x H for the gradient of the hidden states, V x H (float32) for that of the head if it is trained,
and about ``8 x chunk x V`` floats of work space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daekit.errors import UserError
from daekit.losses.divergences import divergence
from daekit.models.heads import compute_dtype, head_logits, teacher_log_probs
from daekit.protocol import OutputHead, Signal

_CHUNK_VALUES = 2**23  # logits per chunk: 262 tokens of a vocabulary of 32,000 (32 MB in float32)


@dataclass(frozen=True)
class PredictionTerms:
    """Which terms, and how much of each.

    Attributes:
        ce_weight: of the cross-entropy with the labels, at temperature 1.
        prediction_weight: of ``T^2 * D(teacher, student)``.
        divergence: ``forward_kl``, ``reverse_kl`` or ``jsd``.
        beta: of ``jsd``.
        temperature: T.
        chunk_tokens: tokens per chunk; None: so many that a chunk has about 8 million logits.
    """

    ce_weight: float = 0.0
    prediction_weight: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class PredictionSums:
    """``loss`` is a sum over the N kept positions and carries the gradient; the rest is detached, one value per position.

    Attributes:
        loss: ``ce_weight * sum(ce_N) + prediction_weight * sum(divergence_N)``, nats.
        ce_N: cross-entropy with the label at temperature 1, nats.
        divergence_N: ``T^2 * D``, nats; None without signals.
        correct_N: whether the label is the student's most likely token.
    """

    loss: Tensor
    ce_N: Tensor
    divergence_N: Tensor | None
    correct_N: Tensor


def prediction_loss(
    hidden_NH: Tensor, head: OutputHead, labels_N: Tensor, signals: Sequence[Signal], terms: PredictionTerms
) -> PredictionSums:
    """The sum of CE and divergence over the kept positions, with gradients for ``hidden_NH`` and a trainable head.

    Args:
        hidden_NH: the student's hidden states at the kept positions; N may be 0 (the loss is then a differentiable 0).
        head: the student's output head.
        labels_N: the token that each position predicts.
        signals: what the teachers say; empty for cross-entropy alone, otherwise covering every position exactly once.
        terms: weights, divergence and temperature.

    Raises:
        UserError: the signals do not speak for as many positions as there are (a teacher of the user's own, as a rule).
    """
    spoken_for = sum(signal.positions_M.numel() for signal in signals)
    if signals and spoken_for != labels_N.numel():
        raise UserError(
            f"the teacher speaks for {spoken_for} positions of a batch that keeps {labels_N.numel()}: "
            "its signals must cover every kept position exactly once"
        )
    wants_gradient = torch.is_grad_enabled()
    loss, ce_N, divergence_N, correct_N = _PredictionLoss.apply(
        hidden_NH, head.weight, head.bias, head, labels_N, tuple(signals), terms, wants_gradient
    )
    return PredictionSums(loss, ce_N, divergence_N if signals else None, correct_N)


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        labels_N: Tensor,
        signals: tuple[Signal, ...],
        terms: PredictionTerms,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work = _Work(hidden_NH, head, labels_N, terms, wants_gradient and any(ctx.needs_input_grad))
        for signal in signals or (None,):
            work.run(signal)
        ctx.save_for_backward(*work.gradients())
        ctx.mark_non_differentiable(work.ce_N, work.divergence_N, work.correct_N)
        return work.total(), work.ce_N, work.divergence_N, work.correct_N

    @staticmethod
    @once_differentiable  # the gradients are constants to autograd: a second derivative would be silently wrong
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


class _Work:
    """One pass over the chunks: per-token values, and gradients where they are wanted."""

    def __init__(
        self, hidden_NH: Tensor, head: OutputHead, labels_N: Tensor, terms: PredictionTerms, wants_gradient: bool
    ) -> None:
        self.hidden_NH, self.head, self.labels_N, self.terms = hidden_NH, head, labels_N, terms
        self.divergence = divergence(terms.divergence, terms.beta)
        self.dtype = compute_dtype(hidden_NH)
        exact = torch.promote_types(torch.float32, hidden_NH.dtype)
        positions = hidden_NH.shape[0]
        self.ce_N = hidden_NH.new_zeros(positions, dtype=exact)
        self.divergence_N = torch.zeros_like(self.ce_N)
        self.correct_N = torch.zeros_like(labels_N, dtype=torch.bool)
        self.wants_gradient = wants_gradient
        self.grad_hidden = torch.zeros_like(hidden_NH) if wants_gradient else None
        trains_head = wants_gradient and head.weight.requires_grad
        self.grad_weight = torch.zeros_like(head.weight, dtype=exact) if trains_head else None
        trains_bias = wants_gradient and head.bias is not None and head.bias.requires_grad
        self.grad_bias = torch.zeros_like(head.bias, dtype=exact) if trains_bias else None  # type: ignore[arg-type]

    def run(self, signal: Signal | None) -> None:
        """All chunks of one signal (None: of all positions, without a teacher)."""
        positions_M = None if signal is None else signal.positions_M
        count = self.hidden_NH.shape[0] if positions_M is None else positions_M.numel()
        step = self.terms.chunk_tokens or max(1, _CHUNK_VALUES // self.head.vocab_size)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            self._chunk(rows if positions_M is None else positions_M[rows], rows, signal)

    def _chunk(self, at: Tensor | slice, rows: slice, signal: Signal | None) -> None:
        terms, labels = self.terms, self.labels_N[at]
        hidden = self.hidden_NH[at]
        logits = head_logits(hidden, self.head)
        log_probs = logits.log_softmax(-1)
        self.ce_N[at] = -log_probs.gather(-1, labels[:, None]).squeeze(-1)
        self.correct_N[at] = logits.argmax(-1) == labels
        slope = None
        if self.wants_gradient and terms.ce_weight:
            slope = log_probs.exp()
            slope[torch.arange(labels.numel(), device=labels.device), labels] -= 1.0
            slope *= terms.ce_weight
        if signal is not None:
            temperature = terms.temperature
            student = log_probs if temperature == 1.0 else (logits / temperature).log_softmax(-1)
            value, pull = self.divergence(student, teacher_log_probs(signal, rows, temperature))
            self.divergence_N[at] = temperature**2 * value
            # d(T^2 D)/d logits = T^2 * dD/d(logits/T) / T
            pull = pull.mul_(terms.prediction_weight * temperature)
            slope = pull if slope is None else slope.add_(pull)
        if self.wants_gradient and slope is not None:
            self._add_gradients(at, hidden, logits, slope)

    def _add_gradients(self, at: Tensor | slice, hidden: Tensor, logits: Tensor, slope: Tensor) -> None:
        head, columns = self.head, self.head.vocab_size
        if head.softcap is not None:
            slope = slope * (1 - (logits / head.softcap) ** 2)
        if head.scale != 1.0:
            slope = slope * head.scale
        if self.grad_bias is not None:
            self.grad_bias[:columns] += slope.sum(0)
        slope = slope.to(self.dtype)
        with torch.autocast(slope.device.type, enabled=False):
            self.grad_hidden[at] = (slope @ head.weight[:columns].to(self.dtype)).to(hidden.dtype)  # type: ignore[index]
            if self.grad_weight is not None:
                self.grad_weight[:columns] += slope.T @ hidden.to(self.dtype)

    def total(self) -> Tensor:
        """The weighted sum over all positions, summed in float64."""
        terms = self.terms
        total = terms.ce_weight * self.ce_N.sum(dtype=torch.float64)
        total = total + terms.prediction_weight * self.divergence_N.sum(dtype=torch.float64)
        return total.to(self.ce_N.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for hidden states, head weight and head bias, each in the dtype of its input."""
        weight = None if self.grad_weight is None else self.grad_weight.to(self.head.weight.dtype)
        bias = None if self.grad_bias is None else self.grad_bias.to(self.head.weight.dtype)
        return self.grad_hidden, weight, bias
