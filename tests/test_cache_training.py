"""Whole runs with cached teachers end in the weights of runs with live ones; labels as a teacher are SFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.protocol import OutputHead
from daekit.teachers import (
    BASE,
    AdapterPath,
    AdapterTeacher,
    CachedTeacher,
    EnsembleTeacher,
    LabelTeacher,
    ModelTeacher,
    write_cache,
)
from daekit.teachers.cache.rows import rows_of_examples
from daekit.teachers.parts import require_served
from daekit.trainers import DomainSFTConfig
from daekit.trainers.prepared import prepared_rows
from tests.helpers import tiny
from tests.helpers.adapter_world import load, save_adapter, save_base
from tests.helpers.cache_cases import V, batch_to, long_rows, model_teacher
from tests.helpers.trainer_world import dae, kd, logged, lora, options, relative, sft, weights

EXACT = dict(pad_to_multiple_of=64, num_train_epochs=2)  # padded alike, a row is the same to the bit beside any others


def live(kind: str, folder: Path) -> Any:
    if kind == "ensemble":
        return EnsembleTeacher([model_teacher(2), model_teacher(3, 32)], [0.4, 0.6])
    if kind == "4-bit":
        return ModelTeacher(load(save_base(folder / "base"), quantization="4bit"), V)
    return model_teacher(2, kind=kind)


def keep(teacher: Any, rows: Any, folder: Path, **how: Any) -> CachedTeacher:
    write_cache(teacher, rows, folder, tokenizer=tiny.tokenizer(), **how)
    return CachedTeacher(folder)


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "ensemble", "4-bit"])
def test_kd_from_hidden_states_is_kd_to_the_bit(kind: str, tmp_path: Path) -> None:
    data = tiny.rows(12)
    teacher = live(kind, tmp_path)
    straight = kd(tmp_path / "a", data, teacher=teacher, divergence="reverse_kl", temperature=1.5, **EXACT)
    cached = keep(teacher, straight.train_dataset, tmp_path / "cache")
    straight.train()
    other = kd(tmp_path / "b", data, teacher=cached, divergence="reverse_kl", temperature=1.5, **EXACT)
    other.train()
    assert torch.equal(weights(straight.model), weights(other.model))
    assert logged(straight, "loss") == logged(other, "loss")


@pytest.mark.parametrize(
    "changes",
    [
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=6, seed=3),
    ],
)
def test_one_cache_serves_other_batches_and_orders(changes: dict[str, Any], tmp_path: Path) -> None:
    data = tiny.rows(12)
    teacher = model_teacher()
    cached = keep(teacher, kd(tmp_path, data).train_dataset, tmp_path / "cache", batch_tokens=500, shard_bytes=9000)
    runs = [kd(tmp_path / "run", data, teacher=each, **(EXACT | changes)) for each in (teacher, cached)]
    for run in runs:
        run.train()
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))


def test_dae_with_both_frozen_models_cached_is_dae_to_the_bit(tmp_path: Path) -> None:
    data = tiny.rows(12)
    expert, reference = model_teacher(3), model_teacher(4, 32)
    straight = dae(tmp_path / "a", data, teachers={"shop": expert}, reference=reference, **EXACT)
    rows = {name: [row for row in straight.train_dataset if row["domain"] == name] for name in ("shop", "general")}
    caches = {name: keep(each, rows[name], tmp_path / name) for name, each in (("shop", expert), ("general", reference))}
    straight.train()
    other = dae(tmp_path / "b", data, teachers={"shop": caches["shop"]}, reference=caches["general"], **EXACT)
    other.train()
    assert torch.equal(weights(straight.model), weights(other.model))
    for key in ("kl/shop", "kl/general"):
        assert logged(straight, key) == logged(other, key)


@pytest.mark.parametrize("size", [1, 4])
def test_an_adapter_of_the_students_base_is_cached_and_serves_a_lora_student(size: int, tmp_path: Path) -> None:
    """Live, rows of several adapters share a forward of PEFT's, which rounds otherwise; alone in a batch they do not."""
    data = tiny.rows(10, domains=("shop", "general"))
    base = save_base(tmp_path / "base")
    expert = save_adapter(tmp_path / "expert", base)
    with_base = dict(peft_config=lora(), per_device_train_batch_size=size, **EXACT)
    straight = dae(
        tmp_path / "a", data, student=load(base), teachers={"shop": AdapterPath(str(expert))}, reference=BASE, **with_base
    )
    alone = load(base)
    adapted = PeftModel.from_pretrained(alone, expert)
    rows = straight.train_dataset
    caches = {
        name: keep(AdapterTeacher(adapted, adapter, V), [row for row in rows if row["domain"] == name], tmp_path / name)
        for name, adapter in (("shop", "default"), ("general", None))
    }
    assert caches["shop"].identity() != caches["general"].identity()
    straight.train()
    other = dae(
        tmp_path / "b", data, student=load(base), teachers={"shop": caches["shop"]}, reference=caches["general"], **with_base
    )
    other.train()
    assert relative(weights(straight.model), weights(other.model)) < (1e-6 if size > 1 else 1e-30)


@pytest.mark.parametrize("changes", [dict(), dict(packing=True, max_length=40), dict(padding_free=True, max_length=None)])
def test_without_padding_to_a_multiple_runs_differ_by_rounding(changes: dict[str, Any], tmp_path: Path) -> None:
    data = tiny.rows(12)
    teacher = model_teacher()
    straight = kd(tmp_path / "a", data, teacher=teacher, **changes)
    cached = keep(teacher, straight.train_dataset, tmp_path / "cache")
    straight.train()
    other = kd(tmp_path / "b", data, teacher=cached, **changes)
    other.train()
    assert relative(weights(straight.model), weights(other.model)) < 1e-6


def test_under_autocast_hidden_states_are_those_of_autocast(tmp_path: Path) -> None:
    data = tiny.rows(8)
    teacher = model_teacher()
    straight = kd(tmp_path / "a", data, teacher=teacher, bf16=True, **EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        cached = keep(teacher, straight.train_dataset, tmp_path / "cache")
    straight.train()
    other = kd(tmp_path / "b", data, teacher=cached, bf16=True, **EXACT)
    other.train()
    assert torch.equal(weights(straight.model), weights(other.model))


def test_a_run_is_not_resumed_with_another_cache(tmp_path: Path) -> None:
    data = tiny.rows(8)
    rows = kd(tmp_path / "run", data).train_dataset
    first = keep(model_teacher(2), rows, tmp_path / "first")
    kd(tmp_path / "run", data, teacher=first, save_strategy="steps", save_steps=1).train()
    second = keep(model_teacher(3), rows, tmp_path / "second")
    with pytest.raises(UserError, match="teacher"):
        kd(tmp_path / "run", data, teacher=second, save_strategy="steps", save_steps=1, num_train_epochs=2).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("how", [dict(keep="top_k", k=16, forced_ids=[1]), dict(keep="sampled", draws=50)])
def test_sparse_caches_train(how: dict[str, Any], tmp_path: Path) -> None:
    data = tiny.rows(12)
    teacher = model_teacher()
    straight = kd(tmp_path / "a", data, teacher=teacher, num_train_epochs=3)
    cached = keep(teacher, straight.train_dataset, tmp_path / "cache", **how)
    straight.train()
    other = kd(tmp_path / "b", data, teacher=cached, num_train_epochs=3)
    other.train()
    a, b = logged(straight, "loss"), logged(other, "loss")
    assert b[-1] < b[0] and a[-1] < a[0]


def test_prepared_rows_are_those_of_the_real_trainer(tmp_path: Path) -> None:
    data = tiny.rows(9)
    for changes in (dict(), dict(packing=True, max_length=40)):
        real = kd(tmp_path / "run", data, eval_dataset=tiny.rows(4, seed=3), **changes)
        args = DomainSFTConfig(**options(tmp_path / "run", **changes))
        made = prepared_rows(tiny.tokenizer(), args, data, tiny.rows(4, seed=3))
        wanted = rows_of_examples([*real.train_dataset, *real.eval_dataset])
        assert [row.key for row in rows_of_examples(made)] == [row.key for row in wanted]


# ---- labels ------------------------------------------------------------------------------------------------------------


def test_forward_kl_to_labels_is_the_cross_entropy() -> None:
    batch = batch_to(long_rows(6))
    (output,) = LabelTeacher().outputs(batch)
    found = []
    for outputs, objective in (([output], Objective()), ([], Objective(ce_weight=1.0, prediction_weight=0.0))):
        logits = 4 * torch.randn(batch.labels_N.numel(), V, generator=torch.Generator().manual_seed(1))
        logits.requires_grad_(True)
        sums = prediction_loss(logits, OutputHead(torch.eye(V), None, V), batch.labels_N, outputs, objective)
        sums.loss.backward()
        found.append((sums.loss.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


def test_a_domain_that_follows_its_labels_beside_one_that_follows_a_model(tmp_path: Path) -> None:
    data = tiny.rows(12)
    run = dae(tmp_path / "run", data, teachers={"shop": LabelTeacher()}, reference=tiny.model(seed=4))
    run.train()
    assert logged(run, "kl/shop") == pytest.approx(logged(run, "ce/shop"), rel=1e-6)
    assert logged(run, "kl/general") != pytest.approx(logged(run, "ce/general"), rel=1e-2)


def test_kd_from_labels_is_sft(tmp_path: Path) -> None:
    data = tiny.rows(12)
    labels, plain = kd(tmp_path / "a", data, teacher=LabelTeacher()), sft(tmp_path / "b", data)
    labels.train()
    plain.train()
    assert relative(weights(labels.model), weights(plain.model)) < 1e-6


@pytest.mark.parametrize("changes", [dict(divergence="reverse_kl"), dict(temperature=2.0), dict(hidden_weight=1.0)])
def test_losses_that_labels_do_not_serve(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="labels"):
        require_served(LabelTeacher(), Objective(**changes), tiny.tokenizer())


def test_the_loss_itself_refuses_probability_0_outside_of_forward_kl() -> None:
    batch = batch_to(long_rows(3))
    (output,) = LabelTeacher().outputs(batch)
    logits = torch.zeros(batch.labels_N.numel(), V)
    for divergence in ("reverse_kl", "jsd", "skew_reverse_kl", "tv"):
        with pytest.raises(UserError, match=f"^divergence: {divergence}"):
            prediction_loss(
                logits, OutputHead(torch.eye(V), None, V), batch.labels_N, [output], Objective(divergence=divergence)
            )
