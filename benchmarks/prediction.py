"""The prediction loss (hidden states and output heads -> loss and gradients) beside other ways to the same values.

    python benchmarks/prediction.py                       # CPU, float32
    python benchmarks/prediction.py --device cuda         # vocabulary of 128,256, width 4096, bfloat16

Contestants: ours (``daekit.losses.prediction_loss``); plain (whole logits, ``log_softmax``, autograd); trl (its chunked
divergence); liger (its fused distillation loss, on a GPU); floor (only the matrix products that no exact method avoids, in
our chunks; it computes no loss).
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Case, Unavailable, main
from measure import Outcome, Work
from torch import Tensor

from daekit.losses import Objective, prediction_loss
from daekit.losses.prediction import tokens_per_chunk
from daekit.protocol import Member, OutputHead, TeacherOutput

BETA = 0.5  # of jsd


@dataclass(frozen=True)
class Shape:
    """Sizes and objective of one case; letters as in the legend of ``daekit/protocol.py``."""

    device: torch.device
    dtype: torch.dtype
    N: int = 2048
    H: int = 1024
    V: int = 32_000
    trained_head: bool = False
    divergence: str = "forward_kl"
    ce_weight: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """A student and a teacher whose distributions differ visibly, the same numbers for every contestant."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor
    labels_N: Tensor

    @property
    def trained(self) -> list[Tensor]:
        """What gets a gradient."""
        return [tensor for tensor in (self.hidden_NH, self.weight_VH) if tensor.requires_grad]


def make(shape: Shape) -> Inputs:
    """Random inputs; logits have a standard deviation of about 2."""
    generator = torch.Generator(shape.device).manual_seed(0)
    options: dict[str, Any] = dict(generator=generator, device=shape.device, dtype=shape.dtype)
    hidden, teacher = (torch.randn(shape.N, shape.H, **options) for _ in range(2))
    weight, teacher_weight = (torch.randn(shape.V, shape.H, **options).mul_(2 / shape.H**0.5) for _ in range(2))
    labels = torch.randint(shape.V, (shape.N,), generator=generator, device=shape.device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(shape.trained_head), teacher, teacher_weight, labels)


def with_gradients(loss: Tensor, inputs: Inputs) -> Outcome:
    """Backward; the gradients as returned, so that the next call begins as this one did."""
    return loss.detach(), torch.autograd.grad(loss, inputs.trained)


def ours(shape: Shape) -> Work:
    """daekit's own."""
    inputs = make(shape)
    head, teacher_head = OutputHead(inputs.weight_VH, None, shape.V), OutputHead(inputs.teacher_VH, None, shape.V)
    positions = torch.arange(shape.N, device=shape.device)
    output = TeacherOutput(positions, (Member(inputs.teacher_NH, teacher_head),))
    objective = Objective(ce_weight=shape.ce_weight, divergence=shape.divergence, beta=BETA)

    def work() -> Outcome:
        sums = prediction_loss(inputs.hidden_NH, head, inputs.labels_N, [output], objective)
        return with_gradients(sums.loss, inputs)

    return work


def plain(shape: Shape) -> Work:
    """Whole logits of both models, in float32 before the softmax, and autograd."""
    inputs = make(shape)

    def work() -> Outcome:
        student = (inputs.hidden_NH @ inputs.weight_VH.T).float().log_softmax(-1)
        with torch.no_grad():
            teacher = (inputs.teacher_NH @ inputs.teacher_VH.T).float().log_softmax(-1)
        if shape.divergence == "forward_kl":
            loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
        else:
            parts = torch.stack([student + torch.tensor(1 - BETA).log(), teacher + torch.tensor(BETA).log()])
            mixture = parts.logsumexp(0)
            loss = BETA * F.kl_div(mixture, teacher, reduction="sum", log_target=True)
            loss = loss + (1 - BETA) * F.kl_div(mixture, student, reduction="sum", log_target=True)
        if shape.ce_weight:
            loss = loss + shape.ce_weight * F.nll_loss(student, inputs.labels_N, reduction="sum")
        return with_gradients(loss, inputs)

    return work


def trl(shape: Shape) -> Work:
    """TRL's chunked divergence; cross-entropy by its chunked log-probabilities."""
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    inputs = make(shape)
    beta = {"forward_kl": 0.0, "jsd": BETA}[shape.divergence]

    def work() -> Outcome:
        divergence_N, _ = ChunkedDivergenceFunction.apply(
            inputs.hidden_NH, inputs.weight_VH, None, inputs.teacher_NH, inputs.teacher_VH, None, beta
        )
        loss = divergence_N.sum()
        if shape.ce_weight:
            log_probs_N, *_ = ChunkedLogProbFunction.apply(
                inputs.hidden_NH, inputs.weight_VH, None, inputs.labels_N, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
            )
            loss = loss - shape.ce_weight * log_probs_N.sum()
        return with_gradients(loss, inputs)

    return work


def liger(shape: Shape) -> Work:
    """Liger's fused distillation loss. It returns a mean, and always computes the gradient of the head."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        raise Unavailable("not installed") from None

    inputs = make(shape)
    beta = {"forward_kl": 0.0, "jsd": BETA}[shape.divergence]
    compiled = shape.device.type == "cuda"
    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=shape.ce_weight, weight_soft_loss=1.0, beta=beta, temperature=1.0, compiled=compiled
    )

    def work() -> Outcome:
        mean = fused(inputs.hidden_NH, inputs.weight_VH, inputs.teacher_NH, inputs.teacher_VH, inputs.labels_N, None, None)
        return with_gradients(mean * shape.N, inputs)

    return work


@torch.no_grad()
def floor_products(shape: Shape, inputs: Inputs) -> Outcome:
    """Both projections, the gradient of the hidden states and, if it is trained, that of the head; nothing between them."""
    step = tokens_per_chunk(shape.V, shape.device.type == "cuda")
    grad_hidden = torch.empty_like(inputs.hidden_NH)
    grad_weight = torch.zeros_like(inputs.weight_VH) if shape.trained_head else None
    for start in range(0, shape.N, step):
        rows = slice(start, start + step)
        logits = inputs.hidden_NH[rows] @ inputs.weight_VH.T
        inputs.teacher_NH[rows] @ inputs.teacher_VH.T
        torch.mm(logits, inputs.weight_VH, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.addmm_(logits.T, inputs.hidden_NH[rows])
    return None, ()


def floor(shape: Shape) -> Work:
    """The matrix products alone."""
    return functools.partial(floor_products, shape, make(shape))


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases of a device."""
    base = Shape(options.device, options.dtype)
    if options.small:
        base = replace(base, N=96, H=64, V=1000)
    cuda = options.device.type == "cuda"
    names = [OURS, "plain", "trl", *(["liger"] if cuda else []), "floor"]
    makers = {OURS: ours, "plain": plain, "trl": trl, "liger": liger, "floor": floor}
    # bfloat16 logits carry 8 bits; their rounding averages out in the sums, but every contestant rounds elsewhere
    tolerance = 1e-4 if options.dtype == torch.float32 else 2e-2

    def case(label: str, shape: Shape) -> Case:
        name = f"{label} N={shape.N} H={shape.H} V={shape.V}"
        return Case(name, {who: functools.partial(makers[who], shape) for who in names}, tolerance)

    if cuda and not options.small:
        large = replace(base, V=128_256, H=4096, trained_head=True)
        whole = replace(large, N=8192)  # the most telling case first: a time limit may cut off the others
        chosen = [case("trained head", whole), case("frozen head", replace(whole, trained_head=False))]
        return [
            *chosen,
            case("trained head, jsd", replace(whole, divergence="jsd")),
            case("trained head", replace(large, N=1024)),
        ]
    chosen = [
        case("frozen head", base),
        case("trained head", replace(base, trained_head=True)),
        case("trained head + CE", replace(base, trained_head=True, ce_weight=0.5)),
        case("frozen head, jsd", replace(base, divergence="jsd")),
    ]
    if options.small:
        return chosen
    grown = [replace(base, N=N) for N in (512, 1024, 4096)]
    grown += [replace(base, V=V) for V in (8_000, 64_000, 128_000)]
    grown += [replace(base, H=H) for H in (512, 2048)]
    return chosen + [case("growth", shape) for shape in grown]


if __name__ == "__main__":
    main(__doc__, cases)
