"""One batch of three domains, and the distributions of teachers at its loss positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daekit.models.heads import teacher_log_probs
from daekit.protocol import Batch, Teacher, TeacherOutput
from tests.helpers import tiny
from tests.helpers.batches import collate, make_rows

V = len(tiny.WORDS)


ROWS = [
    row | {"domain": domain}
    for row, domain in zip(make_rows(7, 6), ("general", "shop", "law", "shop", "general", "law"), strict=True)
]


def batch_of(layout: str = "right") -> Batch:
    return collate(ROWS, layout)


def log_probs(outputs: list[TeacherOutput], kept: int, temperature: float = 1.0) -> Tensor:
    """``[N, V]``: what the outputs say about each loss position, each exactly once."""
    out = torch.full((kept, V), float("nan"))
    for output in outputs:
        assert out[output.positions_M].isnan().all()
        out[output.positions_M] = teacher_log_probs(output, slice(None), temperature)
    assert not out.isnan().any()
    return out


def says(speaker: Teacher, batch: Batch, temperature: float = 1.0) -> Tensor:
    return log_probs(speaker.outputs(batch), batch.labels_N.numel(), temperature)


def plain(model: Any, batch: Batch) -> Tensor:
    """``[N, V]`` log-probabilities of a model row by row, from its own logits."""
    found = []
    for row in ROWS:
        if row["domain"] in batch.domains:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :, :V]
            found += [logits[t] for t, token in enumerate(row["labels"][1:]) if token != -100]
    return torch.stack(found).log_softmax(-1)
