"""The Triton kernel of the prediction loss against its plain twin (on a GPU where there is one, see kernel_device.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from daekit.errors import UserError
from daekit.losses import DIVERGENCES, Objective
from daekit.losses.kernels import prediction
from daekit.protocol import OutputHead
from tests.helpers import kernel_twins as twins
from tests.helpers.kernel_device import DEVICE, EXACT, close

UNTOUCHED = 7.0
# of the interpreter, about lanes that no kernel stores
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def chunk(tokens: int, columns: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens * 1000 + columns)
    student, teacher = (spread * torch.randn(2, tokens, columns)).to(DEVICE, dtype)
    return student, teacher, torch.randint(columns, (tokens,), device=DEVICE)


def chunk_losses(
    student: Tensor, teacher: Tensor | None, labels: Tensor, divergence: str, parameter: float, temperature: float,
    ce_weight: float, prediction_weight: float, softcap: float | None, scale: float, wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    objective = Objective(
        ce_weight=ce_weight, prediction_weight=prediction_weight, divergence=divergence, temperature=temperature,
        **({"beta": parameter} if divergence == "jsd" else {"skew_alpha": parameter}),
    )  # fmt: skip
    head = OutputHead(student, None, student.shape[1], scale, softcap)
    return prediction.chunk_losses(student, teacher, labels, objective, head, wants_gradient)


def same_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, divergence: str = "forward_kl", parameter: float = 0.3,
    temperature: float = 1.0, ce_weight: float = 0.0, prediction_weight: float = 1.0, softcap: float | None = None,
    scale: float = 1.0, exact: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value and gradient are those of the twin, and without a gradient the values are the same and nothing is written."""
    terms = (divergence, parameter, temperature, ce_weight, prediction_weight, softcap, scale)
    ce, value, correct, gradient = twins.chunk_losses(student, teacher, labels, *terms)
    before = student.clone()
    alone = chunk_losses(student, teacher, labels, *terms, False)
    assert torch.equal(student, before)
    ours = chunk_losses(student, teacher, labels, *terms, True)
    for result in (alone, ours):
        torch.testing.assert_close(result[0].cpu().double(), ce, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(result[1].cpu().double(), value, rtol=3e-6, atol=3e-6)
        assert torch.equal(result[2].cpu(), correct)
    close(student, gradient, exact or EXACT[student.dtype])
    return ours


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "ce_weight", "softcap", "scale"),
    [(1.0, 0.0, None, 1.0), (1.0, 0.5, 4.0, 0.5), (2.0, 0.3, None, 1.5), (0.7, 0.0, 3.0, 1.0)],
)
def test_every_divergence(divergence: str, temperature: float, ce_weight: float, softcap: float | None, scale: float) -> None:
    same_terms(*chunk(3, 37), divergence, 0.3, temperature, ce_weight, 0.8, softcap, scale)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(divergence: str, dtype: torch.dtype) -> None:
    student, teacher, labels = chunk(3, 50, dtype=dtype)
    same_terms(student.clone(), teacher, labels, divergence, ce_weight=0.5)
    same_terms(student, teacher.float() / 3, labels, divergence, temperature=2.0)  # an ensemble's logits are float32


@pytest.mark.parametrize("columns", [1, 2, 16, 17, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_any_number_of_columns(columns: int, divergence: str) -> None:
    same_terms(*chunk(2, columns), divergence, temperature=2.0, ce_weight=1.0)


@pytest.mark.parametrize(("ce_weight", "prediction_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_weights(ce_weight: float, prediction_weight: float) -> None:
    same_terms(*chunk(3, 20), ce_weight=ce_weight, prediction_weight=prediction_weight, temperature=2.0)


@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_without_a_teacher(ce_weight: float) -> None:
    student, _, labels = chunk(3, 20)
    divergence = same_terms(student, None, labels, ce_weight=ce_weight, softcap=3.0)[1]
    assert torch.equal(divergence, torch.zeros_like(divergence))


@pytest.mark.parametrize(("divergence", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_no_skew_is_the_plain_kl(divergence: str, plain: str) -> None:
    (student, teacher, labels), (other, *_) = chunk(3, 20), chunk(3, 20)
    options = (0.7, 0.5, 0.5, None, 1.0, True)
    skewed = chunk_losses(student, teacher, labels, divergence, 0.0, *options)
    usual = chunk_losses(other, teacher, labels, plain, 0.3, *options)
    for mine, theirs in zip((*skewed, student), (*usual, other), strict=True):
        assert torch.equal(mine, theirs)


def test_no_tokens() -> None:
    student, teacher, labels = chunk(0, 20)
    assert [x.shape for x in chunk_losses(student, teacher, labels, "jsd", 0.5, 1.0, 1.0, 1.0, None, 1.0, True)] == [(0,)] * 3


def test_padding_columns_are_neither_read_nor_written() -> None:
    student, teacher, labels = chunk(3, 40)
    wide_s, wide_t = (torch.full((3, 64), UNTOUCHED, device=DEVICE) for _ in range(2))
    wide_s[:, :40], wide_t[:, :40] = student, teacher
    same_terms(wide_s[:, :40], wide_t[:, :40], labels, ce_weight=1.0)
    assert (wide_s[:, 40:] == UNTOUCHED).all()
    with pytest.raises(UserError, match="one piece"):
        same_terms(student.T.contiguous().T, teacher, labels)


@pytest.mark.parametrize("columns", [6, 5000])
def test_the_first_of_the_largest_logits_is_the_prediction(columns: int) -> None:
    student = torch.zeros(6, columns)
    first, second = columns // 3, columns - 2  # in different blocks where there are several
    student[:, first] = student[:, second] = 1.0
    labels = torch.tensor([first, second, 0, columns - 1, first + 1, first], device=DEVICE)
    correct = same_terms(student.to(DEVICE), None, labels)[2]
    assert correct.tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_large_logits(divergence: str, temperature: float) -> None:
    student, teacher, labels = chunk(4, 30, spread=4000.0)
    student[0], teacher[0] = 1e4, -1e4
    student[1], teacher[1] = teacher[1] + 1e4, teacher[1]  # the same distributions, far apart
    # reverse KL's slope is the difference of logarithms of that size: float32 has 1e-3 there
    same_terms(student, teacher, labels, divergence, temperature=temperature, ce_weight=1.0, exact=2e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 2.0), (0.7, 2.0), (1.0, 5000.0)])
def test_a_student_equal_to_its_teacher_feels_nothing(divergence: str, temperature: float, spread: float) -> None:
    student, _, labels = chunk(4, 5000, spread)
    teacher = student.clone()
    value = chunk_losses(student, teacher, labels, divergence, 0.3, temperature, 0.0, 1.0, None, 1.0, True)[1]
    bound = 0.0 if divergence in ("forward_kl", "reverse_kl", "tv") else 1e-6
    assert float(value.abs().max()) <= bound
    assert float(student.abs().max()) <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_teacher_excludes(divergence: str) -> None:
    student, teacher, labels = chunk(3, 20)
    teacher[:, ::3] = -torch.inf
    if divergence == "reverse_kl":  # infinite by its formula: huge, and not NaN
        value = chunk_losses(student, teacher, labels, divergence, 0.3, 1.0, 0.0, 1.0, None, 1.0, True)[1]
        assert (value > 1e25).all()
        assert not student.isnan().any()
    else:
        same_terms(student, teacher.clamp(min=-1e30), labels, divergence)
        again = chunk(3, 20)[0]
        chunk_losses(again, teacher, labels, divergence, 0.3, 1.0, 0.0, 1.0, None, 1.0, True)
        assert torch.equal(student, again)


def test_errors_are_not_hidden() -> None:
    student, teacher, labels = chunk(3, 20)
    student[0, 5] = torch.nan
    teacher[1, 5] = torch.nan
    labels[2] = 20
    ce, value, _ = chunk_losses(student, teacher, labels, "forward_kl", 0.3, 1.0, 1.0, 1.0, None, 1.0, False)
    assert ce.isnan().tolist() == [True, False, True]
    assert value.isnan().tolist() == [True, True, False]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 70), st.sampled_from(DIVERGENCES), st.floats(0.01, 0.99),
    st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.7]), st.sampled_from([None, 5.0]), st.sampled_from([1.0, 0.25]),
    st.sampled_from([0.1, 10.0]),
)  # fmt: skip
def test_any_chunk(
    tokens: int, columns: int, divergence: str, parameter: float, temperature: float, ce_weight: float, softcap: float | None,
    scale: float, spread: float,
) -> None:  # fmt: skip
    same_terms(*chunk(tokens, columns, spread), divergence, parameter, temperature, ce_weight, 1.0, softcap, scale, exact=2e-5)
