"""The hidden-state loss against its twin in float64: value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daekit.losses import hidden
from daekit.losses.hidden import hidden_loss
from tests import reference

KINDS = ["cosine", "mse"]


def case(seed: int, n: int = 11, width: int = 5, other: int = 7) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student's and teacher's hidden states, and a projection where the widths differ."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(n, other, generator=generator, dtype=torch.float64)
    matrix = torch.randn(other, width, generator=generator, dtype=torch.float64) if other != width else None
    return student, teacher, matrix


def both(kind: str, student: Tensor, teacher: Tensor, matrix: Tensor | None, positions: Tensor) -> list[list[Tensor]]:
    """[ours, the twin's]: loss, values, gradients."""
    results = []
    for ours in (True, False):
        leaves = [student.clone().requires_grad_(), *([] if matrix is None else [matrix.clone().requires_grad_()])]
        projection = None if matrix is None else leaves[1]
        if ours:
            loss, values = hidden_loss(leaves[0], teacher, positions, projection, kind)
        else:
            values = reference.hidden_distance(kind, leaves[0][positions], teacher, projection)
            loss = values.sum()
        (0.3 * loss).backward()
        results.append([loss.detach(), values.detach(), *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [5, 7, 3])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_equals_the_formula(kind: str, other: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "_CHUNK", chunk)
    student, teacher, matrix = case(0, other=other)
    for mine, theirs in zip(*both(kind, student, teacher, matrix, torch.arange(11)), strict=True):
        torch.testing.assert_close(mine, theirs)
    some = torch.tensor([7, 2, 3])
    ours, twin = both(kind, student, teacher[:3], matrix, some)
    for mine, theirs in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert ours[2][some].any() and not ours[2][torch.tensor([0, 1, 4, 5, 6, 8, 9, 10])].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(kind: str, autocast: bool) -> None:
    """The arithmetic is float32 whatever autocast says; only inputs and gradients are rounded."""
    student, teacher, matrix = case(0, n=40, width=24, other=32)
    rounded = [tensor.to(torch.bfloat16) for tensor in (student, teacher)]
    leaves = [rounded[0].clone().requires_grad_(), matrix.float().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, values = hidden_loss(leaves[0], rounded[1], torch.arange(40), leaves[1], kind)
    (0.3 * loss).backward()
    twin = both(kind, rounded[0].double(), rounded[1].double(), matrix, torch.arange(40))[1]
    assert leaves[0].grad.dtype == torch.bfloat16 and leaves[1].grad.dtype == loss.dtype == torch.float32
    ours = [loss, values, *(leaf.grad for leaf in leaves)]
    for mine, theirs, tolerance in zip(ours, twin, [1e-5, 1e-5, 5e-3, 1e-5], strict=True):
        assert (mine.double() - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    student, teacher, matrix = case(0, n=4, width=3, other=2)
    positions = torch.tensor([3, 0])
    assert torch.autograd.gradcheck(
        lambda s, m: hidden_loss(s, teacher[:2], positions, m, kind)[0], (student.requires_grad_(), matrix.requires_grad_())
    )


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    n, width, other = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    student, teacher, matrix = case(draw(st.integers(0, 99)), n, width, other)
    for mine, theirs in zip(*both(draw(st.sampled_from(KINDS)), student, teacher, matrix, torch.arange(n)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_hidden_state_of_zeros_has_no_direction() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    loss, values = hidden_loss(student, torch.ones(2, 3), torch.arange(2), None, "cosine")
    loss.backward()
    assert values.tolist() == [1.0, 1.0] and not student.grad.any()


def test_nothing_is_computed_for_what_is_frozen() -> None:
    student, teacher, matrix = case(0)
    loss, values = hidden_loss(student, teacher, torch.arange(11), matrix, "mse")
    assert not loss.requires_grad
    projection = matrix.requires_grad_()
    hidden_loss(student, teacher, torch.arange(11), projection, "mse")[0].backward()
    assert projection.grad.any() and student.grad is None
    assert values.shape == (11,)
