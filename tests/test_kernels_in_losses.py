"""The losses as a GPU runs them, with Triton kernels inside, beside the losses as a CPU runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from daekit.losses.kernels import attention, prediction
from tests.helpers.attention_cases import EVERY, PACKED, batch_of, make_side
from tests.helpers.attention_cases import ours as attention_ours
from tests.helpers.kernel_device import INTERPRETED
from tests.helpers.loss_cases import make_case, make_terms, ours

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU the losses take the kernels by themselves: see test_gpu.py"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "average"), [("forward_kl", "logits"), ("jsd", "probabilities"), ("skew_kl", "logits")])
def test_the_prediction_loss_by_kernels(name: str, average: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, with ensembles, padding, bias, scale and cap, beside what a CPU runs."""
    case = make_case(
        n=9, widths=(13, 16, 12), hidden=(6, 8, 4), weights=(0.6, 0.4), average=average, bias=True, scale=0.7, softcap=3.0
    ).to(dtype)
    terms = make_terms(0.3, 0.7, name, beta=0.3, temperature=2.0, chunk_tokens=4)
    usual, gradients = ours(case, terms)
    calls: list[int] = []

    def kernel(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        return prediction.chunk_losses(*arguments)

    monkeypatch.setattr("daekit.losses.prediction.chunk_losses_on", lambda *_: kernel)
    sums, others = ours(case, terms)
    assert calls == [4, 4, 1]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip((sums.loss, *others), (usual.loss, *gradients), strict=True):
        assert (mine - theirs).double().norm() <= tolerance * theirs.double().norm()
    assert torch.equal(sums.correct_N, usual.correct_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_loss_by_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(PACKED, EVERY)
    sides = make_side(batch, 0, window=5), make_side(batch, 1, window=3)
    usual = attention_ours(*sides, dtype, 0.37)

    monkeypatch.setattr("daekit.losses.attention.attention_kl_", attention.attention_kl_)
    for mine, theirs in zip(attention_ours(*sides, dtype, 0.37), usual, strict=True):
        assert (mine - theirs).double().norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * theirs.double().norm()
