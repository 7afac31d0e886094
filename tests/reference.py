"""The formulas once more, as plainly as they can be written: float64, whole logits, autograd. Shares no code with daekit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Head:
    """A vocabulary projection as plain tensors; columns at and beyond ``vocab`` are padding."""

    weight: Tensor
    bias: Tensor | None
    vocab: int
    scale: float = 1.0
    softcap: float | None = None


def logits(hidden: Tensor, head: Head) -> Tensor:
    out = torch.einsum("nh,vh->nv", hidden.double(), head.weight.double())
    out = out if head.bias is None else out + head.bias.double()
    out = head.scale * out[:, : head.vocab]
    return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)


def probabilities(some_logits: Tensor, temperature: float) -> Tensor:
    powers = torch.exp(some_logits / temperature - (some_logits / temperature).max(dim=1, keepdim=True).values)
    return powers / powers.sum(dim=1, keepdim=True)


def teachers(members: list[tuple[float, Tensor, Head]], average: str, temperature: float) -> Tensor:
    """``[N, V]`` probabilities of several (weight, hidden, head) together."""
    if average == "probabilities":
        return sum(weight * probabilities(logits(hidden, head), temperature) for weight, hidden, head in members)
    return probabilities(sum(weight * logits(hidden, head) for weight, hidden, head in members), temperature)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``[N]`` KL(p || q)."""
    return (p * torch.log(p / q)).sum(dim=1)


def divergence(name: str, student: Tensor, teacher: Tensor, parameter: float) -> Tensor:
    """``[N]`` of two distributions; ``parameter`` is beta of jsd, alpha of the skew divergences."""
    if name == "forward_kl":
        return kl(teacher, student)
    if name == "reverse_kl":
        return kl(student, teacher)
    if name == "skew_kl":
        return kl(teacher, parameter * teacher + (1 - parameter) * student)
    if name == "skew_reverse_kl":
        return kl(student, (1 - parameter) * teacher + parameter * student)
    if name == "tv":
        return (teacher - student).abs().sum(dim=1) / 2
    mixture = parameter * teacher + (1 - parameter) * student
    return parameter * kl(teacher, mixture) + (1 - parameter) * kl(student, mixture)


def buckets(p: Tensor, ids: Tensor) -> Tensor:
    """``[N, K + 1]`` (K where the ids name all tokens): probabilities of the tokens ``ids [N, K]``, and of all others."""
    rows = []
    for row, chosen in zip(p, ids.tolist(), strict=True):
        others = [v for v in range(len(row)) if v not in chosen]
        rows.append(torch.stack([row[v] for v in chosen] + ([row[others].sum()] if others else [])))
    return torch.stack(rows)


def drawn_kl(student: Tensor, drawn: list[list[int]]) -> Tensor:
    """``[N]`` KL(drawn || student): of each position the tokens drawn from its teacher, each worth 1 / their number."""
    values = []
    for p, tokens in zip(student, drawn, strict=True):
        shares = {token: tokens.count(token) / len(tokens) for token in tokens}
        values.append(sum(share * (torch.log(torch.tensor(share).double()) - torch.log(p[t])) for t, share in shares.items()))
    return torch.stack(values)


def seen_by_teacher(ids: list[int], labels: list[int], prompt: list[int]) -> tuple[list[int], list[int]]:
    """What a teacher that is told more sees of a row: its own prompt, then the row from the first token with a label."""
    first = min(place for place, label in enumerate(labels) if label != -100)
    return prompt + ids[first:], [-100] * len(prompt) + labels[first:]


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    p = probabilities(student_logits, 1.0)
    return -torch.log(torch.stack([p[n, int(label)] for n, label in enumerate(labels)]))


def loss(
    student_logits: Tensor, labels: Tensor, teacher: Tensor | None, name: str, parameter: float, temperature: float,
    ce_weight: float, prediction_weight: float, ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``ce_weight * sum CE + prediction_weight * T^2 * sum D`` (tv: without T^2) for ``[N, V]`` logits and teacher
    probabilities at T; with ``ids [N, K]`` D is between the buckets that they make.
    """
    total = ce_weight * cross_entropy(student_logits, labels).sum()
    if teacher is not None:
        student = probabilities(student_logits, temperature)
        if ids is not None:
            student, teacher = buckets(student, ids), buckets(teacher, ids)
        factor = 1.0 if name == "tv" else temperature**2
        total = total + prediction_weight * factor * divergence(name, student, teacher, parameter).sum()
    return total


def attention_map(query: Tensor, key: Tensor, scaling: float, window: int | None, rows: list[int]) -> Tensor:
    """``[A, T, T]`` attention of one sequence: queries ``[A, T, D]``, keys ``[G, T, D]``, the row of each token."""
    heads, length, _ = query.shape
    key = torch.stack([key[a // (heads // key.shape[0])] for a in range(heads)]).double()
    score = scaling * torch.einsum("aqd,akd->aqk", query.double(), key)
    hidden = torch.tensor(
        [
            [k > q or rows[k] != rows[q] or (window is not None and q - k >= window) for k in range(length)]
            for q in range(length)
        ]
    )
    score = torch.where(hidden, -torch.inf, score)
    powers = torch.exp(score - score.max(dim=2, keepdim=True).values.detach())
    return powers / powers.sum(dim=2, keepdim=True)


def attention_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """``[T]`` KL(teacher || student) of attention maps ``[A, T, T]``, summed over heads; where the teacher has 0 it adds 0."""
    looked_at = teacher > 0
    ratio = torch.where(looked_at, teacher, 1.0) / torch.where(looked_at, student, 1.0)
    return (teacher * torch.log(ratio)).sum(dim=(0, 2))


def relation(states: Tensor, heads: int) -> Tensor:
    """Heads ``[A, T, D]`` side by side, split into ``heads`` others (MiniLMv2)."""
    count, _, width = states.shape
    together = torch.cat([states[a] for a in range(count)], dim=1)
    size = count * width // heads
    return torch.stack([together[:, r * size : (r + 1) * size] for r in range(heads)])


def hidden_distance(kind: str, student: Tensor, teacher: Tensor, matrix: Tensor | None) -> Tensor:
    """``[N]`` 1 - cos or the mean squared difference of hidden states ``[N, H]``."""
    image = student.double() if matrix is None else student.double() @ matrix.double().T
    target = teacher.double()
    if kind == "mse":
        return ((image - target) ** 2).mean(dim=1)
    return 1 - (image * target).sum(dim=1) / (image.norm(dim=1) * target.norm(dim=1))


def kept(labels: list[list[int]], rows: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """(sequence, position, label, row) of every position that predicts a token of a response, in order."""
    found = []
    for b, sequence in enumerate(labels):
        for t in range(len(sequence) - 1):
            if sequence[t + 1] != -100:
                found.append((b, t, sequence[t + 1], rows[b][t]))
    return found


def greedy_answer(model: nn.Module, prompt: list[int], most: int, stop: int, vocab_size: int) -> list[int]:
    """The most likely token again and again, a whole forward for each, with the stop token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + most and ids[len(prompt) :][-1:] != [stop]:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :vocab_size].argmax()))
    return ids[len(prompt) :]
