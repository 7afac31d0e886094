"""KL between the attention rows of two models, and its gradient, without any row being stored.

The structure is FlashAttention's: programs hold a block of queries (or keys) of one head and walk over the keys (queries) of
their row that the mask allows. Scores are computed three times with a gradient, once without. Memory beyond the outputs:
three floats per query and head. Nothing waits for the device: grids are sized by an upper bound, and programs without a block
return at once.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from daekit.errors import UserError
from daekit.protocol import AttentionLayer

_NO_WINDOW = 2**30  # farther than any key, and still an int32 after a row's length is added


def attention_kl_(
    student: AttentionLayer,
    teacher: AttentionLayer,
    pairs_R8: Tensor,
    offset_N: Tensor,
    value_N: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None] | None,
) -> None:
    """Writes ``sum over heads of KL(teacher's attention || student's)`` of each covered query, and its gradient, in place.

    Args:
        student: queries at its N loss positions and the keys they may attend to; its mask contains the teacher's (no window,
            or one at least as long).
        teacher: queries at its M loss positions; the same number of query heads, anything else may differ.
        pairs_R8: one line of integers per row that both saw: its first query among the N; among the M; number of its queries
            (consecutive in both); the student's sequence and position in it where the row starts; the same two of the
            teacher; tokens of the row.
        offset_N: each query at a loss position, counted in tokens from the start of its row; ascending within a row.
        value_N: float32, nats; untouched for queries of no pair. None: not wanted.
        gradients: become d(sum of value_N)/d(student's queries), for the queries of the pairs, and the same for the student's
            keys, for all keys of the pairs' rows. None: not wanted.
    """
    if not pairs_R8.shape[0]:
        return
    if value_N is None:
        value_N = student.query_NAD.new_empty(len(offset_N), dtype=torch.float32)
    grad_query_NAD, grad_key_BGTD = gradients or (None, None)
    queries, heads, width_s = student.query_NAD.shape
    device = student.query_NAD.device
    pairs_R8, offset_N = pairs_R8.to(device), offset_N.to(device)
    layers = [_checked(x) for x in (student.query_NAD, student.key_BGTD, teacher.query_NAD, teacher.key_BGTD)]
    query_s, key_s, query_t, key_t = layers
    width_t = query_t.shape[2]
    kl_NA = value_N.new_zeros(queries, heads)
    kl_NA[:, 0] = value_N  # what no program overwrites survives the sum over heads
    lse_s_NA, lse_t_NA = torch.empty_like(kl_NA), torch.empty_like(kl_NA)
    numbers = (
        *query_s.stride()[:2], *key_s.stride()[:3], *query_t.stride()[:2], *key_t.stride()[:3], heads,
        float(student.scaling), float(teacher.scaling), student.window or _NO_WINDOW, teacher.window or _NO_WINDOW,
    )  # fmt: skip
    shapes = dict(
        GROUP_S=heads // key_s.shape[1], GROUP_T=heads // key_t.shape[1],
        D_S=width_s, D_T=width_t, PAD_S=_padded(width_s), PAD_T=_padded(width_t),
    )  # fmt: skip
    query_tiles, key_tiles = _tiles(max(width_s, width_t), max(x.element_size() for x in layers), _roomy(device))
    with torch.cuda.device_of(query_s):
        grad = query_s if grad_query_NAD is None else _checked(grad_query_NAD)
        blocks = _blocks(pairs_R8, pairs_R8[:, 2], query_tiles["OUTER"], queries)
        _query_kernel[(blocks.shape[0], heads)](
            *layers, blocks, offset_N, kl_NA, lse_s_NA, lse_t_NA, grad, *grad.stride()[:2], *numbers,
            GRADIENT=grad_query_NAD is not None, **shapes, **query_tiles, enable_fp_fusion=True,
        )  # fmt: skip
        if grad_key_BGTD is not None:
            grad = _checked(grad_key_BGTD)
            blocks = _blocks(pairs_R8, pairs_R8[:, 7], key_tiles["OUTER"], key_s.shape[0] * key_s.shape[2])
            _attending_kernel[(blocks.shape[0],)](blocks, offset_N, student.window or _NO_WINDOW, key_tiles["OUTER"], STEP=1024)
            _key_kernel[(blocks.shape[0], key_s.shape[1])](
                *layers, blocks, offset_N, lse_s_NA, lse_t_NA, grad, *grad.stride()[:3], *numbers,
                **shapes, **key_tiles, enable_fp_fusion=True,
            )  # fmt: skip
    value_N.copy_(kl_NA.sum(1))


def _blocks(pairs_R8: Tensor, size_R: Tensor, block: int, most: int) -> Tensor:
    """``[P, 11]`` for each program the line of its row, which block of the row is its own, and two columns for the key kernel.

    P is an upper bound, for sizes that sum to ``most`` or less: to know the number itself, the host would have to wait.
    Programs beyond it get a block behind the end of the last row.
    """
    blocks_R = (size_R + block - 1) // block
    end_R = blocks_R.cumsum(0)
    program_P = torch.arange(most // block + size_R.shape[0], device=size_R.device)
    row_P = torch.searchsorted(end_R, program_P, right=True).clamp_(max=size_R.shape[0] - 1)
    block_P = program_P - (end_R - blocks_R)[row_P]
    return torch.cat([pairs_R8[row_P].long(), block_P[:, None].expand(-1, 3)], dim=1)


def _tiles(width: int, bytes_per_value: int, roomy: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Launch options of the query and of the key kernel: as much as fits in shared memory and, nearly, in registers.

    OUTER is the block that a program holds, INNER those that it walks over. Found by compiling for sm_90, 80 and 89 and reading
    the spills (``python -m tests.helpers.compile_kernels``), not by timing: none for half precision up to width 128 on sm_90.
    """
    if width > 256:
        raise UserError(f"attention heads of width {width}: the kernels know at most 256; choose more attention_relation_heads")
    wide = width > 128
    if bytes_per_value > 2:
        query = key = (16, 16, 8, 1) if wide else (32, 32, 8, 1)
    elif roomy:
        query, key = ((128, 32, 8, 2), (64, 16, 8, 2)) if wide else ((128, 64, 8, 2), (128, 32, 8, 2))
    else:
        query, key = ((64, 32, 4, 1), (64, 16, 4, 1)) if wide else ((64, 32, 4, 2), (64, 32, 4, 2))
    names = ("OUTER", "INNER", "num_warps", "num_stages")
    return dict(zip(names, query, strict=True)), dict(zip(names, key, strict=True))


def _roomy(device: torch.device) -> bool:
    """Whether a program may have more than 200 KiB of shared memory: Hopper and Blackwell of the data centre."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _checked(tensor: Tensor) -> Tensor:
    if tensor.stride(-1) != 1:
        raise UserError(f"queries or keys with strides {tensor.stride()}: the values of one head must lie in one piece")
    return tensor


@triton.jit
def _query_kernel(
    query_s_ptr, key_s_ptr, query_t_ptr, key_t_ptr, blocks_ptr, offset_ptr, kl_ptr, lse_s_ptr, lse_t_ptr, grad_ptr,
    grad_stride_n, grad_stride_a,
    query_s_stride_n, query_s_stride_a, key_s_stride_b, key_s_stride_g, key_s_stride_t,
    query_t_stride_n, query_t_stride_a, key_t_stride_b, key_t_stride_g, key_t_stride_t,
    heads, scaling_s, scaling_t, window_s, window_t,
    GRADIENT: tl.constexpr, GROUP_S: tl.constexpr, GROUP_T: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    PAD_S: tl.constexpr, PAD_T: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Value, normalisers and gradient of OUTER queries of one row and head; the axes of a tile are queries, keys."""
    line = blocks_ptr + 11 * (tl.num_programs(0) - 1 - tl.program_id(0))  # the last blocks of rows are longest: they go first
    head = tl.program_id(1).to(tl.int64)
    first, count = tl.load(line + 8) * OUTER, tl.load(line + 2)
    if first >= count:
        return
    local_O = tl.arange(0, OUTER)
    mine_O = first + local_O < count
    n, m = tl.load(line) + first, tl.load(line + 1) + first
    # queries behind the last count as the last one, so that nothing is empty; they are not stored
    offset_O = tl.load(offset_ptr + n + tl.minimum(local_O, count - first - 1)).to(tl.int32)
    query_s_ptr += head * query_s_stride_a + n * query_s_stride_n
    query_t_ptr += head * query_t_stride_a + m * query_t_stride_n
    query_s = _tile(query_s_ptr, query_s_stride_n, count - first, D_S, PAD_S, OUTER)
    query_t = _tile(query_t_ptr, query_t_stride_n, count - first, D_T, PAD_T, OUTER)
    key_s_ptr += tl.load(line + 3) * key_s_stride_b + head // GROUP_S * key_s_stride_g + tl.load(line + 4) * key_s_stride_t
    key_t_ptr += tl.load(line + 5) * key_t_stride_b + head // GROUP_T * key_t_stride_g + tl.load(line + 6) * key_t_stride_t
    low = (tl.maximum(tl.min(offset_O, 0) - window_s + 1, 0) // INNER * INNER).to(tl.int64)
    high = (tl.max(offset_O, 0) + 1).to(tl.int64)

    top_s_O = tl.full([OUTER], -1e30, tl.float32)
    top_t_O = tl.full([OUTER], -1e30, tl.float32)
    sum_s_O = tl.zeros([OUTER], tl.float32)
    sum_t_O = tl.zeros([OUTER], tl.float32)
    weighted_O = tl.zeros([OUTER], tl.float32)  # sum of exp(x_t - top_t) * (x_t - x_s)
    for start in range(low, high, INNER):
        key_s = _tile(key_s_ptr + start * key_s_stride_t, key_s_stride_t, high - start, D_S, PAD_S, INNER)
        key_t = _tile(key_t_ptr + start * key_t_stride_t, key_t_stride_t, high - start, D_T, PAD_T, INNER)
        distance = offset_O[:, None] - (start + tl.arange(0, INNER)).to(tl.int32)[None, :]
        x_s = _scores(query_s, key_s, scaling_s, (distance >= 0) & (distance < window_s))
        x_t = _scores(query_t, key_t, scaling_t, (distance >= 0) & (distance < window_t))
        new_s_O, new_t_O = tl.maximum(top_s_O, tl.max(x_s, 1)), tl.maximum(top_t_O, tl.max(x_t, 1))
        sum_s_O = sum_s_O * tl.exp(top_s_O - new_s_O) + tl.sum(tl.exp(x_s - new_s_O[:, None]), 1)
        p_t, shrink_O = tl.exp(x_t - new_t_O[:, None]), tl.exp(top_t_O - new_t_O)
        sum_t_O = sum_t_O * shrink_O + tl.sum(p_t, 1)
        weighted_O = weighted_O * shrink_O + tl.sum(tl.where(p_t > 0, p_t * (x_t - x_s), 0.0), 1)
        top_s_O, top_t_O = new_s_O, new_t_O

    kl_O = weighted_O / sum_t_O + (top_s_O - top_t_O) + (tl.log(sum_s_O) - tl.log(sum_t_O))
    lse_s_O, lse_t_O = top_s_O + tl.log(sum_s_O), top_t_O + tl.log(sum_t_O)
    at_O = (n + local_O) * heads + head
    tl.store(kl_ptr + at_O, kl_O, mask=mine_O)
    tl.store(lse_s_ptr + at_O, lse_s_O, mask=mine_O)
    tl.store(lse_t_ptr + at_O, lse_t_O, mask=mine_O)

    if GRADIENT:
        grad = tl.zeros([OUTER, PAD_S], tl.float32)
        for start in range(low, high, INNER):
            key_s = _tile(key_s_ptr + start * key_s_stride_t, key_s_stride_t, high - start, D_S, PAD_S, INNER)
            key_t = _tile(key_t_ptr + start * key_t_stride_t, key_t_stride_t, high - start, D_T, PAD_T, INNER)
            distance = offset_O[:, None] - (start + tl.arange(0, INNER)).to(tl.int32)[None, :]
            x_s = _scores(query_s, key_s, scaling_s, (distance >= 0) & (distance < window_s))
            x_t = _scores(query_t, key_t, scaling_t, (distance >= 0) & (distance < window_t))
            grad_scores = tl.exp(x_s - lse_s_O[:, None]) - tl.exp(x_t - lse_t_O[:, None])
            grad = tl.dot(grad_scores.to(key_s.dtype), key_s, grad, input_precision="ieee")
        grad_ptr += head * grad_stride_a + n * grad_stride_n
        _store_tile(grad_ptr, grad_stride_n, grad * scaling_s, count - first, D_S, PAD_S, OUTER)


@triton.jit
def _key_kernel(
    query_s_ptr, key_s_ptr, query_t_ptr, key_t_ptr, blocks_ptr, offset_ptr, lse_s_ptr, lse_t_ptr, grad_ptr,
    grad_stride_b, grad_stride_g, grad_stride_t,
    query_s_stride_n, query_s_stride_a, key_s_stride_b, key_s_stride_g, key_s_stride_t,
    query_t_stride_n, query_t_stride_a, key_t_stride_b, key_t_stride_g, key_t_stride_t,
    heads, scaling_s, scaling_t, window_s, window_t,
    GROUP_S: tl.constexpr, GROUP_T: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr,
    PAD_S: tl.constexpr, PAD_T: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Gradient of OUTER keys of one row and key head; the axes of a tile are keys, queries."""
    line = blocks_ptr + 11 * tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    first, length = tl.load(line + 8) * OUTER, tl.load(line + 7)
    if first >= length:
        return
    n, m = tl.load(line), tl.load(line + 1)
    offset_ptr += n
    low, high = tl.load(line + 9) // INNER * INNER, tl.load(line + 10)
    token_s, token_t = tl.load(line + 4) + first, tl.load(line + 6) + first
    key_s_ptr += tl.load(line + 3) * key_s_stride_b + group * key_s_stride_g + token_s * key_s_stride_t
    key_t_ptr += tl.load(line + 5) * key_t_stride_b + token_t * key_t_stride_t
    key_s = _tile(key_s_ptr, key_s_stride_t, length - first, D_S, PAD_S, OUTER)
    key_O = (first + tl.arange(0, OUTER)).to(tl.int32)

    grad = tl.zeros([OUTER, PAD_S], tl.float32)
    for member in range(0, GROUP_S):
        head = group * GROUP_S + member
        key_t = _tile(key_t_ptr + head // GROUP_T * key_t_stride_g, key_t_stride_t, length - first, D_T, PAD_T, OUTER)
        for start in range(low, high, INNER):
            ours_I = start + tl.arange(0, INNER) < high
            query_s = query_s_ptr + head * query_s_stride_a + (n + start) * query_s_stride_n
            query_s = _tile(query_s, query_s_stride_n, high - start, D_S, PAD_S, INNER)
            query_t = query_t_ptr + head * query_t_stride_a + (m + start) * query_t_stride_n
            query_t = _tile(query_t, query_t_stride_n, high - start, D_T, PAD_T, INNER)
            at_I = start + tl.arange(0, INNER)
            offset_I = tl.load(offset_ptr + at_I, mask=ours_I, other=-1).to(tl.int32)  # -1 attends to no key
            at_I = (n + at_I) * heads + head
            lse_s_I = tl.load(lse_s_ptr + at_I, mask=ours_I, other=0.0)
            lse_t_I = tl.load(lse_t_ptr + at_I, mask=ours_I, other=0.0)
            distance = offset_I[None, :] - key_O[:, None]
            x_s = _scores(key_s, query_s, scaling_s, (distance >= 0) & (distance < window_s))
            x_t = _scores(key_t, query_t, scaling_t, (distance >= 0) & (distance < window_t))
            grad_scores = tl.exp(x_s - lse_s_I[None, :]) - tl.exp(x_t - lse_t_I[None, :])
            grad = tl.dot(grad_scores.to(query_s.dtype), query_s, grad, input_precision="ieee")
    grad_ptr += tl.load(line + 3) * grad_stride_b + group * grad_stride_g + token_s * grad_stride_t
    _store_tile(grad_ptr, grad_stride_t, grad * scaling_s, length - first, D_S, PAD_S, OUTER)


@triton.jit
def _attending_kernel(blocks_ptr, offset_ptr, window_s, OUTER: tl.constexpr, STEP: tl.constexpr):
    """Columns 9 and 10 of a block of keys: of its row's queries, the first that attends to it and the first behind those.

    Offsets ascend, so counting finds both. It has a kernel of its own: once for all heads, and with bounds that come from a sum
    instead of a load, Triton 3.9 no longer sees in the loop over the queries that their addresses are aligned.
    """
    line = blocks_ptr + 11 * tl.program_id(0)
    offset_ptr += tl.load(line)
    count = tl.load(line + 2)
    first = tl.load(line + 8) * OUTER
    before_L = tl.zeros([STEP], tl.int64)
    within_L = tl.zeros([STEP], tl.int64)
    for start in range(0, count, STEP):
        at_L = start + tl.arange(0, STEP)
        offset_L = tl.load(offset_ptr + at_L, mask=at_L < count, other=0)
        before_L += ((offset_L < first) & (at_L < count)).to(tl.int64)
        within_L += ((offset_L < first + OUTER - 1 + window_s) & (at_L < count)).to(tl.int64)
    tl.store(line + 9, tl.sum(before_L, 0))
    tl.store(line + 10, tl.sum(within_L, 0))


@triton.jit
def _scores(rows, columns, scaling, allowed):
    """Scaled products of two tiles, -inf where the mask forbids."""
    return tl.where(allowed, tl.dot(rows, tl.trans(columns), input_precision="ieee") * scaling, float("-inf"))


@triton.jit
def _tile(ptr, stride, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The ROWS vectors from ``ptr`` on, zeros from the ``count``-th on and beyond their width."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    return tl.load(ptr + row * stride + column, mask=(row < count.to(tl.int32)) & (column < WIDTH), other=0.0)


@triton.jit
def _store_tile(ptr, stride, tile, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    tl.store(ptr + row * stride + column, tile.to(ptr.dtype.element_ty), mask=(row < count.to(tl.int32)) & (column < WIDTH))
