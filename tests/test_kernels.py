"""The Triton kernels against their plain twins: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from daekit.errors import UserError
from daekit.losses.kernels.attention import attention_kl_
from daekit.losses.kernels.prediction import DIVERGENCES, chunk_terms
from daekit.protocol import AttentionLayer
from tests import kernel_twins as twins

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
EXACT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the largest value, for gradients
UNTOUCHED = 7.0
# of the interpreter, about lanes that no kernel stores
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

if INTERPRETED:
    # Triton 3.9's interpreter multiplies the bits of bf16 in tl.dot as if they were integers; give it their values
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    _create_dot = InterpreterBuilder.create_dot

    def _dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return _create_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = _dot_of_values


def close(ours: Tensor, theirs: Tensor, relative: float) -> None:
    """Equal up to ``relative`` of the largest value."""
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=relative * max(1e-2, float(theirs.abs().max())))


# ---- prediction ----


def chunk(tokens: int, columns: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens * 1000 + columns)
    student, teacher = (spread * torch.randn(2, tokens, columns)).to(DEVICE, dtype)
    return student, teacher, torch.randint(columns, (tokens,), device=DEVICE)


def same_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, divergence: str = "forward_kl", parameter: float = 0.3,
    temperature: float = 1.0, ce_weight: float = 0.0, prediction_weight: float = 1.0, softcap: float | None = None,
    scale: float = 1.0, exact: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value and gradient are those of the twin, and without a gradient the values are the same and nothing is written."""
    terms = (divergence, parameter, temperature, ce_weight, prediction_weight, softcap, scale)
    ce, value, correct, gradient = twins.chunk_terms(student, teacher, labels, *terms)
    before = student.clone()
    alone = chunk_terms(student, teacher, labels, *terms, False)
    assert torch.equal(student, before)
    ours = chunk_terms(student, teacher, labels, *terms, True)
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


@pytest.mark.parametrize(("ce_weight", "prediction_weight"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_weights(ce_weight: float, prediction_weight: float) -> None:
    same_terms(*chunk(3, 20), ce_weight=ce_weight, prediction_weight=prediction_weight, temperature=2.0)


@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_without_a_teacher(ce_weight: float) -> None:
    student, _, labels = chunk(3, 20)
    divergence = same_terms(student, None, labels, ce_weight=ce_weight, softcap=3.0)[1]
    assert torch.equal(divergence, torch.zeros_like(divergence))


def test_no_tokens() -> None:
    student, teacher, labels = chunk(0, 20)
    assert [x.shape for x in chunk_terms(student, teacher, labels, "jsd", 0.5, 1.0, 1.0, 1.0, None, 1.0, True)] == [(0,)] * 3


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
    value = chunk_terms(student, teacher, labels, divergence, 0.3, temperature, 0.0, 1.0, None, 1.0, True)[1]
    bound = 0.0 if divergence in ("forward_kl", "reverse_kl", "tv") else 1e-6
    assert float(value.abs().max()) <= bound
    assert float(student.abs().max()) <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_teacher_excludes(divergence: str) -> None:
    student, teacher, labels = chunk(3, 20)
    teacher[:, ::3] = -torch.inf
    if divergence == "reverse_kl":  # infinite by its formula: huge, and not NaN
        value = chunk_terms(student, teacher, labels, divergence, 0.3, 1.0, 0.0, 1.0, None, 1.0, True)[1]
        assert (value > 1e25).all()
        assert not student.isnan().any()
    else:
        same_terms(student, teacher.clamp(min=-1e30), labels, divergence)
        again = chunk(3, 20)[0]
        chunk_terms(again, teacher, labels, divergence, 0.3, 1.0, 0.0, 1.0, None, 1.0, True)
        assert torch.equal(student, again)


def test_errors_are_not_hidden() -> None:
    student, teacher, labels = chunk(3, 20)
    student[0, 5] = torch.nan
    teacher[1, 5] = torch.nan
    labels[2] = 20
    ce, value, _ = chunk_terms(student, teacher, labels, "forward_kl", 0.3, 1.0, 1.0, 1.0, None, 1.0, False)
    assert ce.isnan().tolist() == [True, False, True]
    assert value.isnan().tolist() == [True, True, False]
    with pytest.raises(UserError, match="choose one of forward_kl, reverse_kl"):
        chunk_terms(student, teacher, labels, "kl", 0.3, 1.0, 1.0, 1.0, None, 1.0, False)


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


# ---- attention ----


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
        attention_kl_(self.student, self.teacher, self.pairs, self.offsets, value, grad_query, grad_key)
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
        dict(lengths=[70, 3], windows=(1, 1), heads=2, groups=(2, 1)),
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


# ---- the package ----


def test_the_losses_do_not_import_triton() -> None:
    code = "import sys, daekit.losses; print(not {'triton', 'daekit.losses.kernels'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


def test_the_kernels_say_when_triton_is_missing() -> None:
    code = "import importlib.util as u; u.find_spec = lambda name: None\nimport daekit.losses.kernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: the losses on CUDA need triton, which is not installed" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shared"), [(90, 227), (80, 163), (89, 99)])
def test_the_kernels_compile_without_a_gpu(arch: int, shared: int) -> None:
    """For data-centre and consumer cards: into their shared memory (KiB), and half precision with hardly a spilled register."""
    command = [sys.executable, "-m", "tests.compile_kernels", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 46
    assert not [kernel for kernel in kernels if kernel["shared"] > shared * 1024]
    assert not [kernel for kernel in kernels if kernel["stack"] > 64 and not re.search("256|fp32", kernel["kernel"])]
