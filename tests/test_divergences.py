"""The divergences themselves: value and slope against autograd on their twins, limits, bad parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import divergence
from daekit.losses.divergences import value_factor
from tests import reference
from tests.helpers.loss_cases import DIVERGENCES, V


def two_distributions(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher, ``[4, V]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(4, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def value(name: str, parameter: float, student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(name, parameter)(student.log_softmax(-1), teacher.log_softmax(-1))[0]


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_value_and_slope(name: str, parameter: float, spread: float) -> None:
    student, teacher = two_distributions(spread=spread)
    student.requires_grad_(True)
    p = reference.probabilities(teacher, 1.0)
    expected = reference.divergence(name, reference.probabilities(student, 1.0), p, parameter)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        logs = (x.detach().log_softmax(-1).to(dtype) for x in (student, teacher))
        mine, slope = divergence(name, parameter)(*logs)
        torch.testing.assert_close(mine.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slope.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_mixtures_stay_finite_and_exact_however_small_a_share(name: str, share: float) -> None:
    """In float32 ``1 - 1e-9`` is 1, and at logits of 100 the probabilities of either side underflow."""
    student, teacher = two_distributions(spread=100.0)
    student.requires_grad_(True)
    p = reference.probabilities(teacher, 1.0)
    expected = reference.divergence(name, reference.probabilities(student, 1.0), p, share)
    mine, slope = divergence(name, share)(*(x.detach().log_softmax(-1).float() for x in (student, teacher)))
    torch.testing.assert_close(mine.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert slope.isfinite().all()


def test_limits_of_jsd_are_the_two_kls() -> None:
    student, teacher = two_distributions()
    small = 1e-6
    for beta, limit in ((small, "forward_kl"), (1 - small, "reverse_kl")):
        expected = value(limit, 0.5, student, teacher)
        torch.testing.assert_close(value("jsd", beta, student, teacher) / small, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(value("jsd", 0.5, student, teacher), value("jsd", 0.5, teacher, student))


def test_skew_without_skew_is_the_kl_and_near_it_close() -> None:
    student, teacher = two_distributions()
    for name, limit in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        expected = value(limit, 0.5, student, teacher)
        assert torch.equal(value(name, 0.0, student, teacher), expected)
        torch.testing.assert_close(value(name, 1e-7, student, teacher), expected, rtol=1e-5, atol=0)


def test_tv_is_a_distance_between_0_and_1() -> None:
    student, teacher = two_distributions(spread=1000.0)
    far = value("tv", 0.5, student, teacher)
    assert (far <= 1).all() and far.max() == 1
    torch.testing.assert_close(value("tv", 0.5, teacher, student), far)
    assert value_factor("tv", 3.0) == 1 and value_factor("skew_kl", 3.0) == 9


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("kl", 0.5, "divergence: 'kl' is unknown; choose forward_kl, .* or tv"),
        ("jsd", 0.0, "beta: 0.0"),
        ("jsd", 1.0, "beta: 1.0"),
        ("jsd", 2.0, "beta"),
        ("skew_kl", 1.0, "skew_alpha: 1.0"),
        ("skew_reverse_kl", 1.0, "skew_alpha: 1.0"),
        ("skew_reverse_kl", -0.1, "skew_alpha: -0.1"),
        ("skew_kl", float("nan"), "skew_alpha: nan"),
    ],
)
def test_bad_divergences(name: str, parameter: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divergence(name, parameter)
