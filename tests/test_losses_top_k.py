"""The prediction loss with sparse teachers: K named tokens and one bucket for all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.losses.top_k import bucket_log_probs
from daekit.models.scoring import score_rows
from daekit.protocol import Member, OutputHead, TeacherOutput, TopK
from daekit.teachers import EnsembleTeacher, RoutedTeacher
from tests import reference
from tests.helpers.loss_cases import DIVERGENCES, Case, V, check, make_case, ours, relative_error, terms_of, top_k_output, twin
from tests.helpers.loss_models import random_batch, tiny_model


def sparse_case(k: int = 4, **options: Any) -> Case:
    case = make_case(**options)
    p = reference.teachers(case.members, case.average, 1.0)
    return replace(case, ids=p.topk(k, dim=1).indices)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_equals_the_twin(name: str, parameter: float, temperature: float, k: int) -> None:
    case = sparse_case(k, n=9, bias=True, scale=0.8, softcap=5.0)
    check(case, terms_of(name, parameter, temperature=temperature), 1e-12, upstream=0.37)
    check(case.to(torch.float32), terms_of(name, parameter, temperature=temperature), 2e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_bfloat16(name: str, parameter: float, autocast: bool) -> None:
    case = sparse_case(6, n=200, widths=(40, 48), hidden=(16, 24), vocab=37)
    rounded = case.to(torch.bfloat16)
    output = top_k_output(rounded.to(torch.float64), 1.0)
    terms = terms_of(name, parameter, chunk_tokens=16)
    given = case.to(torch.float32) if autocast else rounded
    hidden, weight = (x.clone().requires_grad_(True) for x in (given.hidden, given.head.weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = prediction_loss(hidden, OutputHead(weight, None, 37), case.labels, [output], *terms.both)
    sums.loss.backward()
    loss, expected = twin(rounded, terms)
    assert relative_error(sums.loss, loss) < 5e-3
    for mine, theirs in zip((hidden.grad, weight.grad), expected, strict=False):
        assert relative_error(mine, theirs) < 2e-2


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_gradcheck(name: str, parameter: float) -> None:
    case = sparse_case(2, n=5, widths=(7, 8), hidden=(3, 4), vocab=6, scale=0.8, softcap=3.0)
    output, terms = top_k_output(case, 1.7), terms_of(name, parameter, temperature=1.7, chunk_tokens=2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return prediction_loss(
            hidden, OutputHead(weight, None, 6, 0.8, 3.0), case.labels, [output], terms.objective, terms.chunk_tokens
        ).loss

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_(True) for x in (case.hidden, case.head.weight)])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    vocab, n = draw(st.integers(2, 9)), draw(st.integers(1, 7))
    case = make_case(seed=draw(st.integers(0, 10**6)), n=n, vocab=vocab, widths=(vocab + 2, vocab), bias=draw(st.booleans()))
    k = draw(st.integers(1, vocab))
    case.ids = torch.tensor([draw(st.permutations(range(vocab)))[:k] for _ in range(n)])  # the order does not matter
    name, parameter = draw(st.sampled_from(DIVERGENCES))
    terms = terms_of(
        name, parameter, draw(st.floats(0, 2)), draw(st.floats(0.01, 2)), draw(st.sampled_from([0.7, 1.0, 2.0])), 3
    )
    sums, gradients = ours(case, terms)
    loss, expected = twin(case, terms)
    torch.testing.assert_close(sums.loss, loss, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_all_tokens_named_is_the_whole_distribution_and_fewer_are_a_lower_bound() -> None:
    case = make_case(n=9)
    for name, parameter in DIVERGENCES:
        whole, _ = ours(case, terms_of(name, parameter, temperature=2.0))
        named, _ = ours(sparse_case(V, n=9), terms_of(name, parameter, temperature=2.0))
        torch.testing.assert_close(named.divergence_N, whole.divergence_N, rtol=1e-10, atol=1e-12)
        for k in (1, 4, V - 1):
            fewer, _ = ours(sparse_case(k, n=9), terms_of(name, parameter, temperature=2.0))
            assert (fewer.divergence_N <= whole.divergence_N + 1e-12).all()


def test_outputs_of_both_kinds_in_one_batch() -> None:
    dense, sparse = make_case(n=9), sparse_case(V, n=9)
    terms = terms_of("reverse_kl", 0.5)
    whole, gradients = ours(dense, terms)
    hidden = dense.hidden.clone().requires_grad_(True)
    first, rest = torch.tensor([8, 3, 1]), torch.tensor([0, 7, 2, 5, 4, 6])
    top_k = top_k_output(sparse, 1.0).top_k
    head = dense.members[0][2]
    member = Member(dense.members[0][1][rest], OutputHead(head.weight, None, V))
    outputs = [
        TeacherOutput(first, (), top_k=TopK(top_k.ids_MK[first], top_k.log_probs_MK[first])),
        TeacherOutput(rest, (member,)),
    ]
    sums = prediction_loss(
        hidden, OutputHead(dense.head.weight, None, V), dense.labels, outputs, terms.objective, terms.chunk_tokens
    )
    sums.loss.backward()
    torch.testing.assert_close(sums.divergence_N, whole.divergence_N, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_certain_teachers_and_students_stay_finite(name: str, parameter: float) -> None:
    """A teacher that leaves nothing to its tail in float32 (the sum is 1, or above it by rounding), and an opposed student."""
    case = make_case(n=3).to(torch.float32)
    hidden = (1e4 * case.hidden).requires_grad_(True)
    log_probs = torch.tensor([[-1e-9, -60.0], [1e-6, -60.0], [-0.7, -0.6]])
    output = TeacherOutput(torch.arange(3), (), top_k=TopK(torch.tensor([[0, 1], [2, 3], [4, 5]]), log_probs))
    terms = terms_of(name, parameter, 0.0, 1.0)
    log_probs[2] = log_probs[2].log_softmax(0)
    sums = prediction_loss(
        hidden, OutputHead(case.head.weight, None, V), case.labels, [output], terms.objective, terms.chunk_tokens
    )
    sums.loss.backward()
    assert sums.divergence_N.isfinite().all() and (sums.divergence_N > 0).any()
    assert hidden.grad.isfinite().all()


def test_no_loss_position() -> None:
    case = sparse_case(2, n=0)
    sums, gradients = ours(case, terms_of("forward_kl", 0.5))
    assert sums.loss == 0 and gradients[0].shape == (0, 6) and not gradients[1].any()


def rounded_top_k(teacher: Tensor, k: int, dtype: torch.dtype, tail: bool = True) -> TopK:
    """Top-k of ``[N, V]`` float64 probabilities, the log-probabilities rounded, the tail's taken before."""
    named = teacher.topk(k, dim=1)
    others = teacher.scatter(1, named.indices, 0.0).sum(1)
    return TopK(named.indices, named.values.log().to(dtype), 1.0, others.log().float() if tail else None)


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
def test_sixteen_bits_with_the_tail_stored(name: str, parameter: float, spread: float) -> None:
    """Against the float64 truth of the buckets: flat teachers and teachers whose K tokens hold all but 1e-9 of the mass."""
    generator = torch.Generator().manual_seed(0)
    teacher_logits, student_logits = (spread * torch.randn(40, 37, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = teacher_logits.softmax(1)
    top_k = rounded_top_k(teacher, 12, torch.float16)
    student = student_logits.clone().requires_grad_()
    p, s = reference.buckets(teacher, top_k.ids_MK), reference.buckets(student.softmax(1), top_k.ids_MK)
    value = reference.divergence(name, s, p, parameter)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    head = OutputHead(torch.eye(37, dtype=torch.float64), None, 37)
    hidden = student_logits.clone().requires_grad_()
    output = TeacherOutput(torch.arange(40), (), top_k=top_k)
    sums = prediction_loss(
        hidden, head, torch.zeros(40, dtype=torch.long), [output], terms_of(name, parameter, 0.0, 1.0).objective
    )
    sums.loss.backward()
    assert relative_error(sums.divergence_N, value.detach()) < 5e-3  # fp16 steps by 0.4% of a small probability
    assert relative_error(hidden.grad, gradient) < 5e-3


def test_a_stored_tail_changes_nothing_where_there_is_no_rounding() -> None:
    case = sparse_case(4, n=9)
    p = reference.teachers(case.members, case.average, 1.0)
    outputs = [TeacherOutput(torch.arange(9), (), top_k=rounded_top_k(p, 4, torch.float64, tail)) for tail in (False, True)]
    head = OutputHead(case.head.weight, None, V)
    without, stored = (
        prediction_loss(case.hidden, head, case.labels, [o], terms_of("reverse_kl", 0.5).objective) for o in outputs
    )
    torch.testing.assert_close(stored.divergence_N, without.divergence_N, rtol=1e-6, atol=1e-8)  # the tail is float32


def test_some_positions_of_an_output_keep_their_tails() -> None:
    """Where CE counts at the labelled positions alone, an output is taken apart; its divergence stays what it is."""
    case, labelled = sparse_case(4, n=9), torch.tensor([False, True, True, False, False, True, False, True, False])
    p = reference.teachers(case.members, case.average, 1.0)
    output = TeacherOutput(torch.arange(9), (), top_k=rounded_top_k(p, 4, torch.float64))
    head, objective = OutputHead(case.head.weight, None, V), terms_of("reverse_kl", 0.5, ce_weight=0.5).objective
    whole, some = (
        prediction_loss(case.hidden, head, case.labels, [output], objective, labelled_N=mask) for mask in (None, labelled)
    )
    torch.testing.assert_close(some.divergence_N, whole.divergence_N)
    expected = objective.prediction_weight * whole.divergence_N.sum() + 0.5 * whole.ce_N[labelled].sum()
    torch.testing.assert_close(some.loss, expected)


def test_rounded_probabilities_and_their_tail_are_a_distribution_again() -> None:
    p = (6 * torch.randn(20, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(1)
    buckets = bucket_log_probs(
        TeacherOutput(torch.arange(20), (), top_k=rounded_top_k(p, 4, torch.float16)), V, Objective(), torch.float32
    )
    torch.testing.assert_close(buckets.exp().sum(1), torch.ones(20), rtol=0, atol=1e-6)


HALF = torch.full((2, 2), 0.25).log()


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF, 2.0), "temperature: the loss has 1.0 .* temperature 2.0"),
        (TopK(torch.tensor([[0, 1], [2, V]]), HALF), f"ids_MK: {V} is no id"),
        (TopK(torch.tensor([[0, 1], [-1, 3]]), HALF), "ids_MK: -1 is no id"),
        (TopK(torch.tensor([[0, 1], [3, 3]]), HALF), "row 1 names a token twice"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.25, 0.25], [0.7, 0.7]]).log()), "row 1 sum to 1.4"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.25, 0.25], [1.0, 0.0]]).log()), "row 1 .* finite"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF * float("nan")), "row 0 sum to nan"),
        (TopK(torch.arange(V).repeat(2, 1), torch.full((2, V), 0.9 / V).log()), "sum to 0.9; .* name all tokens"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF.half()), "16-bit .* tail_log_mass_M"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF.bfloat16(), 1.0, HALF[:, 0]), "bfloat16 steps"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF.half(), 1.0, HALF[:, 0].half()), "tail_log_mass_M: torch.float16"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF.half(), 1.0, HALF), "tail_log_mass_M: .* one float32 logarithm for each"),
        (TopK(torch.tensor([[0, 1], [2, 3]]), HALF.half(), 1.0, HALF[:, 0]), "row 0 sum to 0.7.*with that of the tail"),
        (TopK(torch.tensor([[0, 1]]), HALF[:1]), "for 2 positions"),
        (TopK(torch.tensor([[0], [2]]), HALF), "ids of shape"),
        (TopK(torch.empty(2, 0, dtype=torch.long), torch.empty(2, 0)), "1 <= K"),
    ],
)
def test_what_is_no_distribution_is_refused(top_k: TopK, message: str) -> None:
    case = make_case(n=2).to(torch.float32)
    output = TeacherOutput(torch.arange(2), (), top_k=top_k)
    with pytest.raises(UserError, match=message):
        prediction_loss(case.hidden, OutputHead(case.head.weight, None, V), case.labels, [output], Objective())


def test_members_beside_top_k_are_refused() -> None:
    case = sparse_case(2, n=2)
    output = replace(top_k_output(case, 1.0), members=(Member(case.hidden, OutputHead(case.head.weight, None, V)),))
    with pytest.raises(UserError, match="both members and top_k"):
        prediction_loss(case.hidden, OutputHead(case.head.weight, None, V), case.labels, [output], Objective())


class SparseTeacher:
    """Says the same two tokens everywhere."""

    def outputs(self, batch: Any, capture: Any = None) -> list[TeacherOutput]:
        n = batch.labels_N.numel()
        return [TeacherOutput(torch.arange(n), (), top_k=TopK(torch.tensor([[0, 1]] * n), torch.full((n, 2), 0.25).log()))]

    def to(self, device: torch.device) -> SparseTeacher:
        return self

    def identity(self) -> dict[str, object]:
        return {}


def test_who_may_hold_a_sparse_teacher() -> None:
    batch = random_batch(43)
    with pytest.raises(UserError, match="an ensemble cannot hold"):
        EnsembleTeacher([SparseTeacher(), SparseTeacher()]).outputs(batch)
    (output,) = RoutedTeacher({"general": SparseTeacher()}).outputs(batch)
    assert output.top_k.ids_MK.shape[0] == batch.labels_N.numel()
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    with pytest.raises(UserError, match="top_k"):
        score_rows(tiny_model(1), rows, vocab_size=43, teacher=SparseTeacher())
