"""On a GPU: the losses, and a whole step of training, give what they give on the CPU. Run by benchmarks/gpu.sh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from daekit.losses import DIVERGENCES
from daekit.losses.attention import attention_loss, row_pairs
from daekit.protocol import Batch
from tests.helpers import tiny
from tests.helpers.attention_cases import EVERY, PACKED, batch_of, make_side
from tests.helpers.loss_cases import make_case, make_terms, ours
from tests.helpers.trainer_world import gradients, kd, micro_batches, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_loss(divergence: str, dtype: torch.dtype) -> None:
    case = make_case(n=300, widths=(1009, 1024), hidden=(32, 48), vocab=1001, bias=True).to(dtype)
    terms = make_terms(0.3, 0.7, divergence, temperature=2.0, chunk_tokens=128)
    there = replace(
        case,
        hidden=case.hidden.cuda(),
        labels=case.labels.cuda(),
        head=replace(case.head, weight=case.head.weight.cuda(), bias=case.head.bias.cuda()),
        members=[
            (weight, hidden.cuda(), replace(head, weight=head.weight.cuda(), bias=head.bias.cuda()))
            for weight, hidden, head in case.members
        ],
        parts=[part.cuda() for part in case.parts],
    )
    (sums, grads), (others, other_grads) = ours(case, terms), ours(there, terms)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip((others.loss, *other_grads), (sums.loss, *grads), strict=True):
        assert relative(mine.detach().cpu().double(), theirs.detach().double()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windows", [(None, None), (6, 3)])
def test_the_attention_loss(windows: Any, dtype: torch.dtype) -> None:
    batch = batch_of(PACKED, EVERY)
    results = []
    for device in ("cpu", "cuda"):
        here = Batch({}, batch.labels_BT.to(device), batch.row_BT.to(device), batch.domains)
        student, teacher = (make_side(here, seed, window=window).to(dtype) for seed, window in enumerate(windows))
        for side in (student, teacher):
            side.query, side.key = side.query.to(device), side.key.to(device)
        student.query.requires_grad_(), student.key.requires_grad_()
        pairs = row_pairs(here.layout, here.layout, torch.arange(len(here.loss_index_N), device=device))
        loss, value = attention_loss(student.layer(), [(teacher.layer(), pairs)], here.layout.offset_N)
        loss.backward()
        results.append([x.detach().cpu().double() for x in (loss, value, student.query.grad, student.key.grad)])
    for mine, theirs in zip(*results, strict=True):
        assert relative(mine, theirs) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training(checkpointing: bool, packing: bool, tmp_path: Any) -> None:
    weights = {"attention_weight": 0.7, "hidden_weight": 0.3, "ce_weight": 0.2}
    results = []
    for use_cpu in (True, False):
        options = weights | {"use_cpu": use_cpu, "bf16": False, "gradient_checkpointing": checkpointing, "packing": packing}
        trainer = kd(tmp_path, tiny.rows(8), tiny.model(seed=1), tiny.model(seed=2, hidden=48), **options)
        if checkpointing:  # which the Trainer turns on in train() only
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = trainer._prepare_inputs(micro_batches(trainer, 8)[0])
        with trainer.until_backward():
            loss = trainer.compute_loss(trainer.model.train(), batch)
            loss.backward()
        results.append((loss.detach().cpu().double(), gradients(trainer.model).cpu()))
    for mine, theirs in zip(*results, strict=True):
        assert relative(mine, theirs) < 1e-4
