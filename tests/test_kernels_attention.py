"""The Triton kernels of the attention loss against their plain twins (on a GPU where there is one, see kernel_device.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from daekit.errors import UserError
from daekit.losses.kernels.attention import attention_kl_
from daekit.protocol import AttentionLayer
from tests.helpers import kernel_twins as twins
from tests.helpers.kernel_device import DEVICE, EXACT, close

UNTOUCHED = 7.0
# of the interpreter, about lanes that no kernel stores
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


class World:
    """Two models that saw the same rows: the student's packed in one sequence, the teacher's padded, in another order.

    All that belongs to no pair is NaN in the inputs: reading it would show.
    """

    def __init__(
        self, lengths: list[int], keep: float = 0.7, heads: int = 4, groups: tuple[int, int] = (2, 4),
        widths: tuple[int, int] = (16, 16), windows: tuple[int | None, int | None] = (None, None),
        dtype: torch.dtype = torch.float32, spread: float = 1.0,
    ) -> None:  # fmt: skip
        torch.manual_seed(sum(lengths) + heads)
        offsets = [(torch.rand(length) < keep).nonzero().flatten() for length in lengths]
        kept = [len(o) for o in offsets]
        packed, padded, rows = sum(lengths) + 3, max(lengths, default=0) + 2, len(lengths)
        query_s, query_t = (torch.full((sum(kept) + 1, heads, width), torch.nan) for width in widths)
        key_s = torch.full((1, packed, groups[0], widths[0]), torch.nan)
        key_t = torch.full((rows + 1, padded, groups[1], widths[1]), torch.nan)
        pairs, n, start = [], 0, 2
        for row, (length, count) in enumerate(zip(lengths, kept, strict=True)):
            m = sum(kept[row + 1 :]) + 1  # the teacher met the last row first
            pairs.append([n, m, count, 0, start, rows - row, 1, length])
            query_s[n : n + count], query_t[m : m + count] = (spread * torch.randn(count, heads, w) for w in widths)
            key_s[0, start : start + length] = spread * torch.randn(length, groups[0], widths[0])
            key_t[rows - row, 1 : 1 + length] = spread * torch.randn(length, groups[1], widths[1])
            n, start = n + count, start + length
        self.pairs = torch.tensor(pairs, device=DEVICE, dtype=torch.int64).reshape(rows, 8)
        self.offsets = torch.cat([*offsets, torch.zeros(1, dtype=torch.int64)]).to(DEVICE)
        layers = []
        for query, key, width, window in zip((query_s, query_t), (key_s, key_t), widths, windows, strict=True):
            key = key.to(DEVICE, dtype).transpose(1, 2)  # as a model's projection leaves it
            layers.append(AttentionLayer(query.to(DEVICE, dtype), key, 1.3 * width**-0.5, window))
        self.student, self.teacher = layers

    def run(self, query: bool = True, key: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
        value = torch.full((self.offsets.numel(),), UNTOUCHED, device=DEVICE)
        grads = [torch.full_like(x, UNTOUCHED) for x in (self.student.query_NAD, self.student.key_BGTD)]
        grad_query, grad_key = (grad if wanted else None for grad, wanted in zip(grads, (query, key), strict=True))
        attention_kl_(self.student, self.teacher, self.pairs, self.offsets, value, (grad_query, grad_key))
        return value, grad_query, grad_key

    def covered(self) -> tuple[Tensor, Tensor]:
        """Masks of the student's queries and of its keys that belong to a pair."""
        queries = torch.zeros(self.offsets.numel(), dtype=torch.bool)
        keys = torch.zeros(self.student.key_BGTD.shape[2], dtype=torch.bool)
        for n, _, count, _, start, _, _, length in self.pairs.tolist():
            queries[n : n + count] = True
            keys[start : start + length] = True
        return queries, keys

    def check(self, exact: float | None = None) -> None:
        """Value and gradients are the twin's, and nothing else is written."""
        value, grad_query, grad_key = (x.cpu() for x in self.run())
        values, twin_query, twin_key = twins.attention_kl(self.student, self.teacher, self.pairs, self.offsets)
        queries, keys = self.covered()
        assert sorted(values) == queries.nonzero().flatten().tolist()
        exact = exact or EXACT[grad_query.dtype]
        close(value[queries], torch.tensor([values[n] for n in sorted(values)]).double(), 3e-6) if values else None
        close(grad_query[queries], twin_query[queries], exact) if values else None
        close(grad_key[:, :, keys], twin_key[:, :, keys], exact) if keys.any() else None
        assert (value[~queries] == UNTOUCHED).all()
        assert (grad_query[~queries] == UNTOUCHED).all()
        assert (grad_key[:, :, ~keys] == UNTOUCHED).all()


@pytest.mark.parametrize(
    "world",
    [
        dict(lengths=[70, 1, 33]),
        dict(lengths=[40], keep=1.0, groups=(4, 4)),
        dict(lengths=[5, 90], groups=(1, 2), widths=(24, 40), keep=0.3),
        dict(lengths=[33, 64], groups=(4, 1), widths=(40, 16), heads=4),
        dict(lengths=[100, 20], windows=(None, 9), heads=2, groups=(1, 2)),
        dict(lengths=[100, 20], windows=(50, 9), heads=2, groups=(1, 1)),
        dict(lengths=[150], windows=(70, 70), heads=1, groups=(1, 1), keep=0.2),
        dict(lengths=[40, 30], keep=0.0),
        dict(lengths=[]),
        dict(lengths=[20, 9], widths=(130, 20), heads=1, groups=(1, 1)),
    ],
    ids=lambda world: " ".join(f"{key}={value}".replace(" ", "") for key, value in world.items()),
)
def test_attention(world: dict[str, Any]) -> None:
    World(**world).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    World([140, 9], windows=(None, 60), widths=(24, 32), heads=2, groups=(1, 2), dtype=dtype).check()
    World([15, 9], widths=(160, 32), heads=2, groups=(1, 2), dtype=dtype).check()


def test_some_rows_only() -> None:
    """Rows of another teacher belong to no pair, and an empty row between others changes nothing."""
    world = World([20, 30, 10, 40], heads=2, groups=(1, 2))
    world.pairs = world.pairs[[3, 1]].int()
    world.check()
    world.pairs = torch.cat([world.pairs[:1], world.pairs[1:].clone(), world.pairs[1:]])
    world.pairs[1, 2] = 0
    world.pairs[1, 7] = 0
    world.check()


def test_gradients_only_where_wanted() -> None:
    world = World([40], heads=2, groups=(1, 1))
    value, grad_query, grad_key = world.run()
    assert torch.equal(world.run(query=False, key=False)[0], value)
    assert torch.equal(world.run(key=False)[1], grad_query)
    assert torch.equal(world.run(query=False)[2], grad_key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_looks_where_its_teacher_looks(dtype: torch.dtype) -> None:
    world = World([70], heads=2, groups=(1, 1), dtype=dtype, spread=3.0)
    world.pairs[:, [1, 5, 6]] = world.pairs[:, [0, 3, 4]]
    world.teacher = world.student
    value, grad_query, grad_key = world.run()
    queries, keys = world.covered()
    assert not value.cpu()[queries].any()
    assert not grad_query.cpu()[queries].any()
    assert not grad_key.cpu()[:, :, keys].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_no_block_divides_for_consumer_cards(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daekit.losses.kernels.attention._roomy", lambda device: False)
    World([75], windows=(40, 33), heads=2, groups=(1, 2), dtype=dtype).check()


def test_heads_whose_values_do_not_lie_together_are_refused() -> None:
    world = World([10])
    key = world.student.key_BGTD
    world.student = AttentionLayer(world.student.query_NAD, key.mT.contiguous().mT, 1.0)
    with pytest.raises(UserError, match="one piece"):
        world.run()


def test_a_window_of_one_key_has_no_gradient() -> None:
    """In exact numbers; on an AMD EPYC rounding leaves 4e-7 of terms that are about 1, which have no largest value here."""
    World([70, 3], windows=(1, 1), heads=2, groups=(2, 1)).check(exact=6e-5)


def test_sharp_attention() -> None:
    World([30, 40], spread=8.0, heads=2, groups=(1, 1)).check(exact=3e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3), st.floats(0.1, 1.0), st.sampled_from([(1, 2), (2, 2), (2, 1)]),
    st.tuples(st.integers(16, 36), st.integers(16, 36)), st.none() | st.integers(1, 60), st.integers(0, 20),
)  # fmt: skip
def test_any_attention(
    lengths: list[int], keep: float, groups: tuple[int, int], widths: tuple[int, int], window: int | None, wider: int
) -> None:
    World(lengths, keep, 2, groups, widths, (window and window + wider, window)).check(exact=1e-5)
