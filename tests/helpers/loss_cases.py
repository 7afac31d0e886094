"""Students and teachers as plain tensors, the prediction loss on them, and the same by its twin in tests/reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from daekit.losses import Objective, PredictionSums, prediction_loss
from daekit.protocol import Member, OutputHead, TeacherOutput, TopK
from tests import reference

# name and parameter: beta of jsd, skew_alpha of the skew divergences
DIVERGENCES = [
    ("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9), ("skew_kl", 0.1), ("skew_kl", 0.6),
    ("skew_kl", 0.0), ("skew_reverse_kl", 0.1), ("skew_reverse_kl", 0.6), ("skew_reverse_kl", 0.0), ("tv", 0.5),
]  # fmt: skip
V = 11  # columns of the tokenizer; heads are wider


@dataclass
class Case:
    """A student and some teachers as plain tensors, with the positions that each output covers."""

    hidden: Tensor
    head: reference.Head
    labels: Tensor
    members: list[tuple[float, Tensor, reference.Head]]
    average: str = "logits"
    parts: Sequence[Tensor] = ()
    ids: Tensor | None = None  # [N, K]: the teachers give these tokens only, in one output

    def to(self, dtype: torch.dtype) -> Case:
        members = [(weight, hidden.to(dtype), _head_to(head, dtype)) for weight, hidden, head in self.members]
        return replace(self, hidden=self.hidden.to(dtype), head=_head_to(self.head, dtype), members=members)


def _head_to(head: reference.Head, dtype: torch.dtype) -> reference.Head:
    return replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def make_head(generator: torch.Generator, width: int, hidden: int, bias: bool = False, **fields: Any) -> reference.Head:
    weight = torch.randn(width, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    offset = torch.randn(width, generator=generator, dtype=torch.float64) if bias else None
    return reference.Head(weight, offset, fields.pop("vocab", V), **fields)


def make_case(
    seed: int = 0, n: int = 9, widths: Sequence[int] = (13, 16), hidden: Sequence[int] = (6, 8), vocab: int = V, **options: Any
) -> Case:
    """``widths`` and ``hidden`` of the student and of each teacher; equal weights unless ``weights`` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    bias, average = options.pop("bias", False), options.pop("average", "logits")
    weights = options.pop("weights", [1 / (len(widths) - 1)] * (len(widths) - 1))
    heads = [make_head(generator, w, h, bias, vocab=vocab, **options) for w, h in zip(widths, hidden, strict=True)]
    states = [2 * torch.randn(n, h, generator=generator, dtype=torch.float64) for h in hidden]
    labels = torch.randint(0, vocab, (n,), generator=generator)
    parts = [torch.arange(n)]
    return Case(states[0], heads[0], labels, list(zip(weights, states[1:], heads[1:], strict=True)), average, parts)


def ours(case: Case, terms: Terms, upstream: float = 1.0, **head_flags: bool) -> tuple[PredictionSums, list[Any]]:
    """The loss and the gradients of hidden states, head weight and head bias."""
    hidden = case.hidden.clone().requires_grad_(True)
    weight = case.head.weight.clone().requires_grad_(head_flags.get("trains_head", True))
    bias = None if case.head.bias is None else case.head.bias.clone().requires_grad_(head_flags.get("trains_head", True))
    head = OutputHead(weight, bias, case.head.vocab, case.head.scale, case.head.softcap)
    members = [
        (weight_, state, OutputHead(h.weight, h.bias, h.vocab, h.scale, h.softcap)) for weight_, state, h in case.members
    ]
    outputs = (
        [top_k_output(case, terms.objective.temperature)]
        if case.ids is not None
        else [
            TeacherOutput(part, tuple(Member(state[part], h, weight_) for weight_, state, h in members), case.average)
            for part in (case.parts if case.members else [])
        ]
    )
    sums = prediction_loss(hidden, head, case.labels, outputs, *terms.both)
    (upstream * sums.loss).backward()
    return sums, [hidden.grad, weight.grad, None if bias is None else bias.grad]


def top_k_output(case: Case, temperature: float) -> TeacherOutput:
    """What the teachers would say as a sparse distribution over ``case.ids``, in the dtype of the student."""
    p = reference.teachers(case.members, case.average, temperature)
    log_probs = p.gather(1, case.ids).log().to(case.hidden.dtype)
    return TeacherOutput(torch.arange(len(case.ids)), (), top_k=TopK(case.ids, log_probs, temperature))


@dataclass(frozen=True)
class Terms:
    objective: Objective
    chunk_tokens: int | None = None

    @property
    def both(self) -> tuple[Objective, int | None]:
        return self.objective, self.chunk_tokens


def make_terms(
    ce_weight: float = 0.0, prediction_weight: float = 1.0, divergence: str = "forward_kl", beta: float = 0.5,
    skew_alpha: float = 0.1, temperature: float = 1.0, chunk_tokens: int | None = None,
) -> Terms:  # fmt: skip
    return Terms(
        Objective(
            ce_weight=ce_weight, prediction_weight=prediction_weight, divergence=divergence, beta=beta, skew_alpha=skew_alpha,
            temperature=temperature,
        ),
        chunk_tokens,
    )  # fmt: skip


def terms_of(
    name: str, parameter: float, ce_weight: float = 0.3, prediction_weight: float = 0.7, temperature: float = 1.0,
    chunk_tokens: int | None = 4,
) -> Terms:  # fmt: skip
    beta, alpha = (parameter, 0.1) if name == "jsd" else (0.5, parameter)
    return make_terms(ce_weight, prediction_weight, name, beta, alpha, temperature, chunk_tokens)


def twin(case: Case, terms: Terms, upstream: float = 1.0) -> tuple[Tensor, list[Any]]:
    case = case.to(torch.float64)
    leaves = [case.hidden.clone().requires_grad_(True), case.head.weight.clone().requires_grad_(True)]
    if case.head.bias is not None:
        leaves.append(case.head.bias.clone().requires_grad_(True))
    head = replace(case.head, weight=leaves[1], bias=leaves[2] if len(leaves) == 3 else None)
    teacher = reference.teachers(case.members, case.average, terms.objective.temperature) if case.members else None
    o = terms.objective
    loss = reference.loss(
        reference.logits(leaves[0], head), case.labels, teacher, o.divergence, o.parameter, o.temperature, o.ce_weight,
        o.prediction_weight, case.ids,
    )  # fmt: skip
    (upstream * loss).backward()
    return loss.detach(), [*(leaf.grad for leaf in leaves), None][:3]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs).norm() / theirs.norm().clamp(min=1e-30))


def check(case: Case, terms: Terms, tolerance: float, upstream: float = 1.0) -> None:
    sums, gradients = ours(case, terms, upstream)
    loss, expected = twin(case, terms, upstream)
    assert relative_error(sums.loss, loss) < tolerance
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert relative_error(mine, theirs) < tolerance
