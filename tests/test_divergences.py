"""The divergences themselves: value and gradient against autograd on their twins, limits, bad parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import Objective
from daekit.losses.divergences import Divergence, divergence_of, value_factor
from tests import reference
from tests.helpers.loss_cases import DIVERGENCES, V


def two_distributions(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher, ``[4, V]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(4, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def objective(name: str, parameter: float, temperature: float = 1.0) -> Objective:
    values = {"divergence": name, "temperature": temperature, "beta" if name == "jsd" else "skew_alpha": parameter}
    return Objective.of(values)


def divergence(name: str, parameter: float) -> Divergence:
    return divergence_of(objective(name, parameter))


def value(name: str, parameter: float, student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(name, parameter)(student.log_softmax(-1), teacher.log_softmax(-1))[0]


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_value_and_gradient(name: str, parameter: float, spread: float) -> None:
    student, teacher = two_distributions(spread=spread)
    student.requires_grad_(True)
    p = reference.probabilities(teacher, 1.0)
    expected = reference.divergence(name, reference.probabilities(student, 1.0), p, parameter)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        logs = (x.detach().log_softmax(-1).to(dtype) for x in (student, teacher))
        mine, gradient = divergence(name, parameter)(*logs)
        torch.testing.assert_close(mine.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_mixtures_stay_finite_and_exact_however_small_a_share(name: str, share: float) -> None:
    """In float32 ``1 - 1e-9`` is 1, and at logits of 100 the probabilities of either side underflow."""
    student, teacher = two_distributions(spread=100.0)
    student.requires_grad_(True)
    p = reference.probabilities(teacher, 1.0)
    expected = reference.divergence(name, reference.probabilities(student, 1.0), p, share)
    mine, gradient = divergence(name, share)(*(x.detach().log_softmax(-1).float() for x in (student, teacher)))
    torch.testing.assert_close(mine.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert gradient.isfinite().all()


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
    assert value_factor(objective("tv", 0.5, 3.0)) == 1 and value_factor(objective("skew_kl", 0.5, 3.0)) == 9


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"divergence": "kl"}, ["divergence"]),
        ({"beta": 0.0}, ["beta"]),
        ({"beta": 1.0, "divergence": "jsd"}, ["beta"]),
        ({"skew_alpha": 1.0}, ["skew_alpha"]),
        ({"skew_alpha": -0.1}, ["skew_alpha"]),
        ({"skew_alpha": float("nan")}, ["skew_alpha"]),
        ({"temperature": 0.0, "ce_weight": -1.0, "hidden_loss": "l1"}, ["ce_weight", "temperature", "hidden_loss"]),
        ({"attention_layers": "last_0"}, ["attention_layers"]),
        ({"hidden_layers": [[0, 1], [2]]}, ["hidden_layers"]),
        ({"attention_relation_heads": 0}, ["attention_relation_heads"]),
    ],
)
def test_settings_out_of_bounds_are_named_all_at_once(values: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Objective.of(values)
    assert [part.split("=")[0] for part in str(caught.value).split("; ")] == keys


def test_an_objective_without_any_weight_is_refused() -> None:
    with pytest.raises(UserError, match="all 0: there is nothing to learn from"):
        Objective.of({"prediction_weight": 0.0})
