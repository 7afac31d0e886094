"""The attention loss against whole attention maps in float64: value and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from daekit.errors import UserError
from daekit.losses import attention_blocks
from daekit.losses.attention import Pass, attention_loss, relation_heads, row_pairs
from tests import reference
from tests.helpers.attention_cases import EVERY, PACKED, PADDED, SOME, Side, batch_of, check, make_side, ours, twin


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("kept", [EVERY, SOME], ids=["every", "some"])
@pytest.mark.parametrize("windows", [(None, None), (3, 2), (3, 3), (None, 2)], ids=str)
@pytest.mark.parametrize("block", [2**20, 12])
def test_equals_whole_maps(
    rows: list[list[int]], kept: set[tuple[int, int]], windows: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "BLOCK_VALUES", block)
    monkeypatch.setattr(attention_blocks, "SHORTEST_BLOCK", 2)
    batch = batch_of(rows, kept)
    student, teacher = make_side(batch, 0, window=windows[0]), make_side(batch, 1, window=windows[1])
    check(student, teacher, torch.float64, 1e-12, upstream=0.37)
    check(student, teacher, torch.float32, 1e-5)


@pytest.mark.parametrize("groups", [(4, 1), (1, 4), (2, 4)])
def test_groups_and_widths_may_differ(groups: tuple[int, int]) -> None:
    batch = batch_of(PADDED, SOME)
    check(make_side(batch, 0, groups=groups[0], width=8), make_side(batch, 1, groups=groups[1], width=5), torch.float64, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    """The arithmetic is float32 also under autocast; only the inputs and the gradients are rounded, to within 2**-9."""
    batch = batch_of(PACKED, EVERY)
    student, teacher = make_side(batch, 0), make_side(batch, 1)
    rounded = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    exact = tuple(side.to(torch.float64) for side in rounded)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, value, grad_query, grad_key = ours(*rounded, torch.bfloat16)
    expected = twin(*exact)
    assert value.dtype == torch.float32 and grad_query.dtype == grad_key.dtype == torch.bfloat16
    for mine, theirs, tolerance in zip((loss, value, grad_query, grad_key), expected, (1e-5, 1e-5, 5e-3, 5e-3), strict=True):
        assert (mine.double() - theirs).norm() < tolerance * theirs.norm()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # autocast would round the scores of float32 queries
        loss = ours(student, teacher, torch.float32)[0]
    assert abs(loss - twin(student, teacher)[0]) < 1e-5 * loss


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    packed = draw(st.booleans())
    if packed:
        rows = [[row for row, length in enumerate(lengths) for _ in range(length)] + [-1] * draw(st.integers(0, 2))]
    else:
        longest = max(lengths)
        left = draw(st.booleans())
        rows = [[-1] * (longest - n) + [row] * n if left else [row] * n + [-1] * (longest - n) for row, n in enumerate(lengths)]
    kept = draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 27))))
    groups = st.sampled_from([(2, 1), (2, 2), (4, 2), (3, 1)])
    heads, of_student = draw(groups)
    window = draw(st.sampled_from([None, 1, 3]))
    wider = None if window is None else draw(st.sampled_from([None, window, window + 2]))
    batch = batch_of(rows, kept)
    student = make_side(batch, draw(st.integers(0, 99)), heads, of_student, draw(st.integers(1, 5)), wider)
    teacher = make_side(batch, draw(st.integers(100, 199)), heads, heads, draw(st.integers(1, 5)), window)
    check(student, teacher, torch.float64, 1e-10)


def test_gradcheck() -> None:
    batch = batch_of(PACKED, SOME)
    student, teacher = make_side(batch, 0, window=4, width=3), make_side(batch, 1, window=3, width=2)
    pairs = row_pairs(batch.layout, batch.layout, torch.arange(len(batch.loss_index_N)))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        side = replace(student, query=query, key=key)
        return attention_loss(side.layer(), [(teacher.layer(), pairs)], batch.layout.offset_N)[0]

    assert torch.autograd.gradcheck(loss, (student.query.requires_grad_(), student.key.requires_grad_()))


def test_a_student_that_looks_as_its_teacher_gives_exactly_zero() -> None:
    side = make_side(batch_of(PACKED, EVERY), 0)
    for result in ours(side, side, torch.float32):
        assert not result.any()


def test_nothing_kept_is_a_differentiable_zero() -> None:
    batch = batch_of(PADDED, set())
    loss, value, grad_query, grad_key = ours(make_side(batch, 0), make_side(batch, 1))
    assert loss == 0 and value.shape == (0,)
    assert not grad_query.any() and not grad_key.any()


def test_sharp_and_opposed_attention_stays_finite() -> None:
    batch = batch_of(PACKED, EVERY)
    student = make_side(batch, 0)
    teacher = replace(make_side(batch, 1), query=-1e3 * student.query, key=student.key)
    student.query *= 1e3
    for result in ours(student, teacher, torch.float32):
        assert result.isfinite().all() and result.any()


# ---- several teachers, each with rows of its own ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
def test_rows_of_several_teachers(rows: list[list[int]]) -> None:
    """Each sees its own rows only, laid out anew; together they are one teacher that saw all."""
    batch = batch_of(rows, EVERY)
    if rows is PADDED:
        batch = replace(batch, inputs={"attention_mask": (batch.row_BT >= 0).long()})
    else:
        positions = torch.cat([torch.arange(int(n)) for n in batch.layout.length_R] + [torch.zeros(1, dtype=torch.long)])
        batch = replace(batch, inputs={"position_ids": positions[None]})
    student, teacher = make_side(batch, 0), make_side(batch, 1)
    expected = twin(student, teacher)
    query, key = student.query.clone().requires_grad_(), student.key.clone().requires_grad_()
    teachers = []
    for chosen in ([1], [0, 2]):
        part = batch.select(chosen)
        where = torch.isin(batch.row_BT, torch.tensor(chosen))
        if rows is PADDED:
            theirs = Side(teacher.query[chosen], teacher.key[chosen], part, 0.9)
        else:
            theirs = Side(teacher.query[:, :, where[0]], teacher.key[:, :, where[0]], part, 0.9)
        teachers.append((theirs.layer(), row_pairs(batch.layout, part.layout, batch.positions_of(chosen))))
    if rows is PACKED:
        teachers.append(
            (
                Side(teacher.query[:, :, 12:14], teacher.key[:, :, 12:14], batch.select([3]), 0.9).layer(),
                row_pairs(batch.layout, batch.select([3]).layout, batch.positions_of([3])),
            )
        )
    loss, value = attention_loss(replace(student, query=query, key=key).layer(), teachers, batch.layout.offset_N)
    loss.backward()
    for mine, theirs in zip((loss.detach(), value, query.grad, key.grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rows_that_are_not_the_students_are_an_error() -> None:
    batch, other = batch_of(PADDED, EVERY), batch_of([[0] * 9, [-1, -1, 1, 1, 1, 1, -1, -1, -1], [2] * 7 + [-1, -1]], EVERY)
    with pytest.raises(UserError, match="rows are not the student's"):
        row_pairs(batch.layout, other.layout, torch.arange(len(batch.loss_index_N)))
    early, late = batch_of(PADDED, {(0, 1), (0, 2)}), batch_of(PADDED, {(0, 2), (0, 3)})  # rows as long, other loss positions
    with pytest.raises(UserError, match="rows are not the student's"):
        row_pairs(early.layout, late.layout, torch.arange(2))


# ---- two runs under checkpointing ---------------------------------------------------------------------------------------


def test_value_then_gradient_is_both() -> None:
    """What a checkpointed layer does: its first run gives the value, its second the gradient that the first's graph needs."""
    batch = batch_of(PACKED, SOME)
    student, teacher = make_side(batch, 0), make_side(batch, 1)
    expected = ours(student, teacher)
    pairs = row_pairs(batch.layout, batch.layout, torch.arange(len(batch.loss_index_N)))
    query, key = student.query.clone().requires_grad_(), student.key.clone().requires_grad_()
    runs: list[Pass] = [Pass.VALUE, Pass.GRADIENT]
    seen: list[Tensor] = []

    def layer(query: Tensor, key: Tensor) -> Tensor:
        side = replace(student, query=query * 1.0, key=key * 1.0)
        loss, value = attention_loss(side.layer(), [(teacher.layer(), pairs)], batch.layout.offset_N, runs.pop(0))
        seen.append(value)
        return loss

    loss = checkpoint(layer, query, key, use_reentrant=False)
    loss.backward()
    assert not runs
    side = replace(student, query=query)
    again = attention_loss(side.layer(), [(teacher.layer(), pairs)], batch.layout.offset_N, Pass.GRADIENT)
    assert not again[1].any()  # the second run does not compute the value once more
    for mine, theirs in zip((loss.detach(), seen[0], query.grad, key.grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_promised_second_run_that_does_not_come_is_an_error() -> None:
    batch = batch_of(PACKED, SOME)
    student, teacher = make_side(batch, 0), make_side(batch, 1)
    pairs = row_pairs(batch.layout, batch.layout, torch.arange(len(batch.loss_index_N)))
    side = replace(student, query=student.query.requires_grad_())
    loss, _ = attention_loss(side.layer(), [(teacher.layer(), pairs)], batch.layout.offset_N, Pass.VALUE)
    with pytest.raises(RuntimeError, match="would be run again"):
        loss.backward()


# ---- heads and windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_relation_heads_compare_other_numbers_of_heads(heads: int) -> None:
    batch = batch_of(PADDED, SOME)
    student, teacher = make_side(batch, 0, heads=4, groups=2, width=6), make_side(batch, 1, heads=2, groups=1, width=9)
    query, key = student.query.clone().requires_grad_(), student.key.clone().requires_grad_()
    mine = relation_heads(replace(student, query=query, key=key).layer(), heads)
    theirs = relation_heads(teacher.layer(), heads)
    pairs = row_pairs(batch.layout, batch.layout, torch.arange(len(batch.loss_index_N)))
    loss, value = attention_loss(mine, [(theirs, pairs)], batch.layout.offset_N)
    loss.backward()
    split = []
    for side in (student, teacher):
        count = side.query.shape[1]
        keys = side.key.repeat_interleave(count // side.key.shape[1], dim=1)
        relation = lambda states: torch.stack([reference.relation(each, heads) for each in states])  # noqa: E731
        scaling = (count * side.query.shape[3] / heads) ** -0.5
        split.append(Side(relation(side.query), relation(keys), batch, scaling))
    whole, values, _, _ = twin(*split)
    torch.testing.assert_close(loss.detach(), whole)
    torch.testing.assert_close(value, values)
    assert query.grad.abs().sum() > 0 and key.grad.abs().sum() > 0


def test_heads_that_cannot_be_compared() -> None:
    batch = batch_of(PADDED, SOME)
    with pytest.raises(UserError, match=r"student has 4 attention heads, its teacher 2: .*attention_relation_heads"):
        ours(make_side(batch, 0), make_side(batch, 1, heads=2))
    with pytest.raises(UserError, match="attention_relation_heads=5: 4 heads of width 6"):
        relation_heads(make_side(batch, 0).layer(), 5)


@pytest.mark.parametrize(("windows", "fits"), [((3, None), False), ((3, 4), False), ((3, 3), True), ((9, None), True)])
def test_a_window_that_hides_what_the_teacher_sees(windows: Sequence[int | None], fits: bool) -> None:
    batch = batch_of(PADDED, SOME)
    student, teacher = make_side(batch, 0, window=windows[0]), make_side(batch, 1, window=windows[1])
    if fits:
        check(student, teacher, torch.float64, 1e-12)
    else:
        with pytest.raises(UserError, match=r"window of 3 tokens hides keys .*KL is infinite"):
            ours(student, teacher)
