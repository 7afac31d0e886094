"""Losses that compute their gradients together with their values, so that nothing large waits for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Computed = tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None] | None]


def with_gradients(compute: Callable[..., Computed], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """The loss that ``compute`` returns, which carries the gradient for ``inputs``, and its further values, detached.

    Args:
        compute: Called with one bool per input, whether its gradient is wanted, without autograd. Returns the loss; the values;
            the gradient of the loss with respect to each input, or None where a checkpointed layer will be run again for it.
        inputs: What the loss depends on.
    """
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    outputs: tuple[Tensor, ...] = _WithGradients.apply(compute, wanted, *inputs)
    return outputs


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Computed], wanted: list[bool], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        loss, values, gradients = compute(*wanted)
        # Checkpointing hands to the backward pass what the second run saves here, in the place of what the first one saved.
        # The mark says whose it is, so that inputs can never be taken for their gradient.
        mark = torch.tensor(gradients is not None)
        ctx.save_for_backward(*(inputs if gradients is None else gradients), mark)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    @once_differentiable  # the gradients are constants to autograd: a second derivative would be silently wrong
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, mark = ctx.saved_tensors
        if not mark:
            raise RuntimeError("a loss was told that its layer would be run again for the gradient, but it was not")
        scaled = [None if gradient is None else gradient * grad_loss.to(gradient.dtype) for gradient in gradients]
        return None, None, *scaled
