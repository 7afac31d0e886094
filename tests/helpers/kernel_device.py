"""Where the Triton kernels are tested: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

if INTERPRETED:
    # Triton 3.9's interpreter multiplies the bits of bf16 in tl.dot as if they were integers; give it their values
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    _create_dot = InterpreterBuilder.create_dot

    def _dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return _create_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = _dot_of_values

EXACT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the largest value, for gradients


def close(ours: Tensor, theirs: Tensor, relative: float) -> None:
    """Equal up to ``relative`` of the largest value."""
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=relative * max(1e-2, float(theirs.abs().max())))
