"""The prediction loss against its twin in tests/reference.py: value and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import Objective, prediction, prediction_loss
from daekit.protocol import Member, OutputHead, TeacherOutput
from tests import reference
from tests.helpers.loss_cases import DIVERGENCES, V, check, make_case, make_terms, ours, relative_error, terms_of, twin

# ---- equal to the formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)], ids=["prediction", "both", "ce"])
def test_float32_equals_the_twin(name: str, parameter: float, temperature: float, weights: tuple[float, float]) -> None:
    terms = terms_of(name, parameter, *weights, temperature)
    check(make_case(n=23).to(torch.float32), terms, 1e-5, upstream=0.37)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "top_k"])
@pytest.mark.parametrize("features", [{}, dict(bias=True, scale=2.0, softcap=3.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_a_few_rows_at_a_time_are_all_rows_to_the_bit(
    name: str, parameter: float, features: dict[str, Any], sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies of these tests are so small that all rows go at once; here one row of each thread does."""
    case, terms = make_case(n=23, **features).to(torch.float32), terms_of(name, parameter, temperature=2.0, chunk_tokens=17)
    if sparse:
        case = replace(case, ids=torch.stack([torch.randperm(V)[:4] for _ in range(23)]))
    whole = ours(case, terms)
    monkeypatch.setattr("daekit.losses.chunk._BLOCK_VALUES", 1)
    few = ours(case, terms)
    for mine, theirs in zip([*vars(few[0]).values(), *few[1]], [*vars(whole[0]).values(), *whole[1]], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    check(case, terms, 1e-5)


def test_cross_entropy_alone_needs_no_output() -> None:
    case = replace(make_case(n=23), members=[]).to(torch.float32)
    terms = make_terms(ce_weight=1.0, prediction_weight=0.0, temperature=2.0, chunk_tokens=4)
    check(case, terms, 1e-5)
    assert ours(case, terms)[0].divergence_N is None


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize(
    "features", [dict(bias=True), dict(scale=0.4), dict(softcap=1.5), dict(bias=True, scale=2.0, softcap=3.0)]
)
def test_bias_scale_and_softcap(name: str, parameter: float, features: dict[str, Any]) -> None:
    check(make_case(**features), terms_of(name, parameter, temperature=2.0), 1e-12)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_ensembles_of_teachers_that_differ_in_width(name: str, parameter: float, average: str) -> None:
    case = make_case(widths=(13, 11, 16, 12), hidden=(6, 8, 3, 5), weights=(0.5, 0.3, 0.2), average=average)
    check(case, terms_of(name, parameter, temperature=2.0), 1e-12)


def test_the_two_means_differ() -> None:
    case = make_case(widths=(13, 11, 16), hidden=(6, 8, 3), weights=(0.7, 0.3))
    logits, probabilities = (ours(replace(case, average=a), make_terms())[0].loss for a in ("logits", "probabilities"))
    assert abs(logits - probabilities) > 1e-3


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_order_of_members_does_not_matter_and_one_is_itself(average: str) -> None:
    terms = make_terms(0.3, 0.7, temperature=2.0)
    case = make_case(widths=(13, 11, 16), hidden=(6, 8, 3), weights=(0.7, 0.3), average=average)
    turned = replace(case, members=case.members[::-1])
    for mine, theirs in zip(ours(case, terms)[1][:2], ours(turned, terms)[1][:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    alone = replace(case, members=[(1.0, *case.members[0][1:])])
    twice = replace(case, members=[(0.4, *case.members[0][1:]), (0.6, *case.members[0][1:])])
    for mine, theirs in zip(ours(alone, terms)[1][:2], ours(twice, terms)[1][:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_bfloat16(name: str, parameter: float, autocast: bool) -> None:
    """A logit of size 2 to 8 rounds to within 2**-7 in bfloat16, so a gradient is right to a few per cent, a sum to less."""
    case = make_case(n=200, widths=(40, 48), hidden=(16, 24), vocab=37, bias=True, scale=0.8, softcap=9.0)
    rounded = case.to(torch.bfloat16)
    terms = terms_of(name, parameter, temperature=2.0, chunk_tokens=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums, gradients = ours(case.to(torch.float32) if autocast else rounded, terms)
    loss, expected = twin(rounded, terms)
    assert sums.loss.dtype == torch.float32
    assert relative_error(sums.loss, loss) < 5e-3
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert relative_error(mine, theirs) < 2e-2
    if autocast:  # the projection really ran in bfloat16
        exact, _ = ours(case.to(torch.float32), terms)
        assert relative_error(sums.loss, exact.loss) > 1e-6


@pytest.mark.parametrize("by", ["chunks", "outputs"])
def test_a_bfloat16_head_gathers_its_gradient_in_float32(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 chunks of one token, or 600 outputs in one chunk: a bfloat16 sum of so many stands still long before its end."""
    monkeypatch.setattr(prediction, "_TILE_VALUES", 80)  # tiles of 5 of the 40 rows
    case = make_case(n=600, widths=(40, 48), hidden=(16, 24), vocab=37).to(torch.bfloat16)
    case.hidden = case.hidden.abs()
    if by == "outputs":
        case.parts = list(torch.arange(600).split(1))
    terms = make_terms(0.3, 0.7, chunk_tokens=1 if by == "chunks" else None)
    assert relative_error(ours(case, terms)[1][1], twin(case, terms)[1][1]) < 8e-3


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_gradcheck(name: str, parameter: float) -> None:
    case = make_case(n=5, widths=(7, 8), hidden=(3, 4), vocab=6, bias=True, scale=0.8, softcap=3.0)
    weight_t, state_t, head_t = case.members[0]
    teacher = OutputHead(head_t.weight, head_t.bias, 6, head_t.scale, head_t.softcap)
    outputs = [TeacherOutput(torch.arange(5), (Member(state_t, teacher, weight_t),))]
    terms = terms_of(name, parameter, temperature=1.7, chunk_tokens=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return prediction_loss(
            hidden, OutputHead(weight, bias, 6, 0.8, 3.0), case.labels, outputs, terms.objective, terms.chunk_tokens
        ).loss

    leaves = [x.clone().requires_grad_(True) for x in (case.hidden, case.head.weight, case.head.bias)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_a_second_derivative_is_refused() -> None:
    case = make_case()
    hidden = case.hidden.clone().requires_grad_(True)
    loss = prediction_loss(hidden, OutputHead(case.head.weight, None, V), case.labels, [], Objective(ce_weight=1.0)).loss
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_partition(data: st.DataObject) -> None:
    draw = data.draw
    vocab, n, speakers = draw(st.integers(2, 9)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    size, padding = st.integers(1, 5), st.integers(0, 4)
    shares = draw(st.lists(st.floats(0.1, 1.0), min_size=speakers, max_size=speakers))
    case = make_case(
        seed=draw(st.integers(0, 10**6)),
        n=n,
        vocab=vocab,
        widths=[vocab + draw(padding) for _ in range(speakers + 1)],
        hidden=[draw(size) for _ in range(speakers + 1)],
        bias=draw(st.booleans()),
        weights=[share / sum(shares) for share in shares],
        average=draw(st.sampled_from(["logits", "probabilities"])),
    )
    order = torch.tensor(draw(st.permutations(range(n))), dtype=torch.long)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    case.parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    name, parameter = draw(st.sampled_from(DIVERGENCES))
    ce, prediction, temperature = draw(st.floats(0, 2)), draw(st.floats(0.01, 2)), draw(st.sampled_from([0.7, 1.0, 2.0]))
    terms = terms_of(name, parameter, ce, prediction, temperature, draw(st.sampled_from([None, 1, 2, 5])))
    sums, gradients = ours(case, terms)
    if n == 0:
        assert sums.loss == 0
        assert all(gradient is None or not gradient.any() for gradient in gradients)
        return
    loss, expected = twin(case, terms)
    torch.testing.assert_close(sums.loss, loss, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# ---- per token ----------------------------------------------------------------------------------------------------------


def test_values_per_position() -> None:
    case = make_case(n=23)
    sums, _ = ours(case, make_terms(0.3, 0.7, temperature=2.0, chunk_tokens=4))
    logits = reference.logits(case.hidden, case.head)
    student, teacher = reference.probabilities(logits, 2.0), reference.teachers(case.members, "logits", 2.0)
    torch.testing.assert_close(sums.ce_N, reference.cross_entropy(logits, case.labels))
    torch.testing.assert_close(sums.divergence_N, 4 * reference.kl(teacher, student))
    for name, parameter in DIVERGENCES:
        values, _ = ours(case, terms_of(name, parameter, temperature=2.0))
        expected = (1 if name == "tv" else 4) * reference.divergence(name, student, teacher, parameter)
        torch.testing.assert_close(values.divergence_N, expected)
    assert sums.correct_N.tolist() == [int(row.argmax()) == int(label) for row, label in zip(logits, case.labels, strict=True)]
    assert 0 < sums.correct_N.sum() < 23
    assert not sums.ce_N.requires_grad and not sums.divergence_N.requires_grad


@pytest.mark.parametrize("chunk", [1, 3, 9, 1000, None])
def test_chunk_size_changes_nothing(chunk: int | None) -> None:
    case, terms = make_case(bias=True), make_terms(0.3, 0.7, "jsd", 0.3, temperature=2.0)
    whole, gradients = ours(case, replace(terms, chunk_tokens=9))
    sums, others = ours(case, replace(terms, chunk_tokens=chunk))
    torch.testing.assert_close(sums.ce_N, whole.ce_N, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.divergence_N, whole.divergence_N, rtol=1e-12, atol=1e-15)
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_loss_position_is_a_differentiable_zero(with_teacher: bool) -> None:
    case = make_case(n=0, bias=True)
    sums, gradients = ours(case if with_teacher else replace(case, members=[]), make_terms(0.3, 0.7, temperature=2.0))
    assert sums.loss == 0 and sums.loss.requires_grad
    assert gradients[0].shape == (0, 6)
    assert not gradients[1].any() and not gradients[2].any()


def test_without_gradient_the_value_is_the_same() -> None:
    case, terms = make_case(), make_terms(0.3, 0.7)
    with torch.no_grad():
        head = OutputHead(case.head.weight.clone().requires_grad_(True), None, V)
        output = TeacherOutput(torch.arange(9), (Member(case.members[0][1], OutputHead(case.members[0][2].weight, None, V)),))
        sums = prediction_loss(case.hidden, head, case.labels, [output], *terms.both)
    assert not sums.loss.requires_grad
    assert sums.loss == ours(case, terms)[0].loss


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_a_teacher_equal_to_the_student_gives_zero(name: str, parameter: float) -> None:
    case = make_case().to(torch.float32)
    case.members = [(1.0, case.hidden, case.head)]
    sums, gradients = ours(case, terms_of(name, parameter, 0.0, 1.0, 2.0))
    assert sums.loss == 0
    assert not gradients[0].any() and not gradients[1].any()


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_certain_and_opposed_distributions_stay_finite(name: str, parameter: float) -> None:
    case = make_case().to(torch.float32)
    case.hidden, case.members = 1e4 * case.hidden, [(1.0, -1e4 * case.hidden, case.head)]
    sums, gradients = ours(case, terms_of(name, parameter, 0.5, 0.5))
    assert sums.loss.isfinite() and sums.loss > 0
    assert gradients[0].isfinite().all() and gradients[1].isfinite().all()


def test_outputs_may_divide_the_positions_in_any_order() -> None:
    case, terms = make_case(n=9), make_terms(0.3, 0.7, temperature=2.0, chunk_tokens=2)
    whole, gradients = ours(case, terms)
    case.parts = [torch.tensor([8, 3, 1]), torch.tensor([], dtype=torch.long), torch.tensor([0, 7, 2, 5, 4, 6])]
    sums, others = ours(case, terms)
    torch.testing.assert_close(sums.ce_N, whole.ce_N, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.divergence_N, whole.divergence_N, rtol=1e-12, atol=0)
    for mine, theirs in zip(others[:2], gradients[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_teacher_that_leaves_positions_out_is_an_error() -> None:
    case = make_case()
    case.parts = [torch.arange(7)]
    with pytest.raises(UserError, match="7 positions of a batch that has 9"):
        ours(case, make_terms(0.3, 0.7))


# ---- padding of the vocabulary, and what is trained -----------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_padding_columns_are_never_scored(whose: str, poison: float) -> None:
    terms = make_terms(0.3, 0.7, "jsd", 0.3, temperature=2.0, chunk_tokens=4)
    clean, poisoned = make_case(bias=True), make_case(bias=True)
    head = poisoned.head if whose == "student" else poisoned.members[0][2]
    head.weight[V:], head.bias[V:] = poison, poison
    (sums, gradients), (others, other_gradients) = ours(clean, terms), ours(poisoned, terms)
    assert others.loss == sums.loss
    for mine, theirs in zip(gradients, other_gradients, strict=True):
        assert torch.equal(mine, theirs)
    assert not other_gradients[1][V:].any() and not other_gradients[2][V:].any()
    assert other_gradients[1][:V].any(dim=1).all()


def test_weights_of_positions_are_not_rounded_to_16_bits() -> None:
    """A third in bfloat16 is 0.2% too large: that would be the error of a whole row's gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(shape, generator=generator).bfloat16() for shape in ((96, 32), (50, 32), (96, 32)))
    labels = torch.randint(0, 50, (96,), generator=generator)
    outputs = [TeacherOutput(torch.arange(96), (Member(teacher, OutputHead(weight, None, 50)),))]
    size = {}
    for third in (None, torch.full((96,), 1 / 3)):
        states = hidden.clone().requires_grad_()
        head = OutputHead(weight, None, 50)
        prediction_loss(states, head, labels, outputs, Objective(ce_weight=0.5), weight_N=third).loss.backward()
        assert states.grad is not None
        size[third is None] = float(states.grad.double().abs().sum())
    assert size[False] / size[True] == pytest.approx(1 / 3, rel=5e-4)
