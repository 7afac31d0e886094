"""The attention loss (queries and keys -> loss and gradients), streamed, beside attention maps that exist in full.

    python benchmarks/attention.py                       # CPU, float32
    python benchmarks/attention.py --device cuda         # up to 16,384 tokens, 32 heads, bfloat16

Contestants: ours; maps (as the authors of "A Teacher Is Worth A Million Instructions" do: the whole ``[B, A, T, T]`` softmax of
every layer of both models, then ``t (log t - log s)``, autograd); kept (the same maps, but of the loss positions only: the
best that is plain); sdpa (the student's own attention, forward and backward: what a step costs anyway); floor (only the
matrix products, causal blocks of 256 queries; it computes no loss).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from harness import OURS, Case, main
from measure import Outcome, Work
from torch import Tensor

from daekit.losses.attention import attention_loss, row_pairs
from daekit.protocol import AttentionLayer, RowLayout

BLOCK = 256  # queries per block of the floor
LONGEST_MAPS = 4096  # tokens; longer maps of several layers fit no machine that we have


@dataclass(frozen=True)
class Shape:
    """Sizes of one case, one row of T tokens; letters as in the legend of ``daekit/protocol.py``."""

    device: torch.device
    dtype: torch.dtype
    T: int = 2048
    A: int = 8
    G: int = 2
    D: int = 64
    layers: int = 1
    kept: float = 1.0  # share of the positions: the last ones, as of a prompt and its response

    @property
    def first_kept(self) -> int:
        """The loss positions are this one and all behind it."""
        return self.T - round(self.T * self.kept)


@dataclass(frozen=True)
class Heads:
    """One layer of one model: queries ``[1, A, T, D]`` and keys ``[1, G, T, D]`` after rotary embedding, and the scaling."""

    query: Tensor
    key: Tensor
    scaling: float


def make(shape: Shape, seed: int) -> list[Heads]:
    """The layers of a model; scores have a standard deviation of about 2."""
    generator = torch.Generator(shape.device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (1, heads, shape.T, shape.D)
        return torch.randn(size, generator=generator, device=shape.device, dtype=shape.dtype).mul_(2**0.5)

    return [Heads(draw(shape.A), draw(shape.G), shape.D**-0.5) for _ in range(shape.layers)]


def make_both(shape: Shape) -> tuple[list[Heads], list[Heads]]:
    """The student, whose queries and keys get gradients, and the teacher."""
    student = make(shape, seed=0)
    for layer in student:
        layer.query.requires_grad_()
        layer.key.requires_grad_()
    return student, make(shape, seed=1)


def with_gradients(loss: Tensor, student: list[Heads]) -> Outcome:
    """Backward; the gradients as returned, so that the next call begins as this one did."""
    return loss.detach(), torch.autograd.grad(loss, [tensor for layer in student for tensor in (layer.query, layer.key)])


# ---- contestants ------------------------------------------------------------------------------------------------------


def attention_sum(students: list[AttentionLayer], teachers: list[AttentionLayer], layout: RowLayout) -> Tensor:
    """Our loss: the sum over loss positions of KL(teacher || student), divided by heads x layers; carries the gradient."""
    pairs = row_pairs(layout, layout, torch.arange(len(layout.offset_N), device=layout.offset_N.device))
    losses = [attention_loss(s, [(t, pairs)], layout.offset_N)[0] for s, t in zip(students, teachers, strict=True)]
    return torch.stack(losses).sum() / (students[0].query_NAD.shape[1] * len(students))


def ours(shape: Shape) -> Work:
    """daekit's own; taking the kept queries out is part of the work, as it is in a step."""
    student, teacher = make_both(shape)
    kept = shape.T - shape.first_kept
    index = functools.partial(torch.tensor, device=shape.device)
    offset_N = torch.arange(shape.first_kept, shape.T, device=shape.device)
    layout = RowLayout(index([0]), index([0]), index([shape.T]), index([0, kept]), offset_N)

    def captured(layers: list[Heads]) -> list[AttentionLayer]:
        states = [x.query.transpose(1, 2).flatten(0, 1).index_select(0, offset_N) for x in layers]  # as Batch.keep does
        return [AttentionLayer(query, x.key, x.scaling) for query, x in zip(states, layers, strict=True)]

    def work() -> Outcome:
        return with_gradients(attention_sum(captured(student), captured(teacher), layout), student)

    return work


def attention_map(layer: Heads, first: int) -> Tensor:
    """``[1, A, T - first, T]`` softmax of the rows from ``first`` on, as eager attention makes it, left in float32."""
    groups = layer.query.shape[1] // layer.key.shape[1]
    query, key = layer.query[:, :, first:], layer.key.repeat_interleave(groups, dim=1)
    length = key.shape[2]
    future = torch.ones(length - first, length, dtype=torch.bool, device=key.device).triu(first + 1)
    scores = (query @ key.transpose(2, 3) * layer.scaling).masked_fill(future, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32)


def map_loss(student: list[Tensor], teacher: list[Tensor], first: int) -> Tensor:
    """``sum t (log t - log s)`` over the kept rows of all maps, divided by heads x layers."""
    tiny = torch.finfo(torch.float32).tiny  # of masked entries: 0 log 0 would be NaN
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        s, t = s[:, :, first:], t[:, :, first:]
        total = total + (t * ((t + tiny).log() - (s + tiny).log())).sum()
    return total / (student[0].shape[1] * len(student))


def maps(shape: Shape, kept_only: bool) -> Work:
    """All maps of both models exist before the loss begins; with ``kept_only`` their unused rows are never made."""
    student, teacher = make_both(shape)
    made_from = shape.first_kept if kept_only else 0

    def work() -> Outcome:
        with torch.no_grad():
            theirs = [attention_map(layer, made_from) for layer in teacher]
        mine = [attention_map(layer, made_from) for layer in student]
        return with_gradients(map_loss(mine, theirs, shape.first_kept - made_from), student)

    return work


def sdpa(shape: Shape) -> Work:
    """The student's own attention, all positions, forward and backward: a yardstick."""
    student, _ = make_both(shape)

    def work() -> Outcome:
        for layer in student:
            out = F.scaled_dot_product_attention(
                layer.query, layer.key, layer.key, is_causal=True, scale=layer.scaling, enable_gqa=True
            )
            torch.autograd.grad(out, [layer.query, layer.key], torch.ones_like(out))
        return None, ()

    return work


def floor(shape: Shape) -> Work:
    """Scores of both models and the gradients of queries and keys: four products per block, causal, nothing between them."""
    student, teacher = make_both(shape)
    groups = shape.A // shape.G

    @torch.no_grad()
    def work() -> Outcome:
        for s, t in zip(student, teacher, strict=True):
            for start in range(shape.first_kept, shape.T, BLOCK):
                end = min(start + BLOCK, shape.T)
                rows, seen = groups * (end - start), slice(end)
                query = s.query[0, :, start:end].reshape(shape.G, rows, shape.D)
                scores = query @ s.key[0, :, seen].transpose(1, 2)
                t.query[0, :, start:end].reshape(shape.G, rows, shape.D) @ t.key[0, :, seen].transpose(1, 2)
                scores @ s.key[0, :, seen]
                scores.transpose(1, 2) @ query
        return None, ()

    return work


# ---- cases ------------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases of a device."""
    base = Shape(options.device, options.dtype)
    cuda = options.device.type == "cuda"
    tolerance = 1e-4 if options.dtype == torch.float32 else 2e-2

    def case(shape: Shape) -> Case:
        who: dict[str, Callable[[], Work]] = {OURS: functools.partial(ours, shape)}
        if shape.T * shape.layers <= LONGEST_MAPS * 6 and shape.T <= LONGEST_MAPS:
            who["maps"] = functools.partial(maps, shape, kept_only=False)
            if shape.kept < 1:
                who["kept"] = functools.partial(maps, shape, kept_only=True)
        who |= {"sdpa": functools.partial(sdpa, shape), "floor": functools.partial(floor, shape)}
        name = f"T={shape.T} A={shape.A} layers={shape.layers} {'all kept' if shape.kept == 1 else f'{shape.kept:g} kept'}"
        return Case(name, who, tolerance)

    if options.small:
        shapes = [replace(base, T=300, layers=layers, kept=kept) for layers, kept in ((1, 1.0), (2, 0.25))]
    elif cuda:
        large = replace(base, A=32, G=8, D=128)
        shapes = [replace(large, T=T, kept=kept) for kept in (1.0, 0.25) for T in (4096, 16_384)]
    else:
        lengths = (1024, 2048, 4096, 8192)
        shapes = [replace(base, T=T, layers=n, kept=kept) for n in (1, 6) for kept in (1.0, 0.25) for T in lengths]
    return [case(shape) for shape in shapes]


if __name__ == "__main__":
    main(__doc__, cases)
