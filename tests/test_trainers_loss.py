"""Loss and gradient of the trainers against the float64 twin; accumulation, masks and packing that must not matter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from daekit.errors import UserError
from daekit.models.heads import compute_dtype
from daekit.trainers import DomainSFTConfig, DomainSFTTrainer
from daekit.trainers import loss as loss_module
from tests.helpers import tiny
from tests.helpers.trainer_world import (
    Twin,
    dae,
    gradients,
    in_float64,
    kd,
    logged,
    loss_and_gradient,
    micro_batches,
    options,
    relative,
    weights,
)

TERMS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"divergence": "reverse_kl", "temperature": 2.0, "ce_weight": 0.5},
    {"divergence": "jsd", "beta": 0.3, "ce_weight": 0.5, "prediction_weight": 2.0},
    {"divergence": "skew_kl", "skew_alpha": 0.3, "temperature": 2.0},
    {"divergence": "skew_reverse_kl"},
    {"divergence": "tv", "temperature": 2.0, "ce_weight": 0.5},
    {"ce_weight": 1.0, "prediction_weight": 0.0},
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(f"{k}={v}" for k, v in terms.items()) or "default")
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("method", ["kd", "dae"])
def test_loss_and_gradient_equal_the_formula(method: str, kind: str, terms: dict[str, Any], tmp_path: Any) -> None:
    seed = TERMS.index(terms)
    student, shop, general = (
        tiny.model(kind, 10 + seed),
        tiny.model(kind, 20 + seed, hidden=48),
        tiny.model("mistral", 30 + seed),
    )
    data = tiny.rows(9, seed=seed)
    if method == "kd":
        trainer, teachers = kd(tmp_path, data, student, shop, **terms), {"shop": shop, "general": shop}
    else:
        trainer = dae(tmp_path, data, student, teachers={"shop": shop}, reference=general, **terms)
        teachers = {"shop": shop, "general": general}
    twin = Twin(in_float64(student), {name: in_float64(teacher) for name, teacher in teachers.items()}, trainer.args)
    expected, _ = twin(trainer.train_dataset)
    expected.backward()
    for size in (9, 4):
        loss, gradient = loss_and_gradient(trainer, micro_batches(trainer, size))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert relative(gradient, gradients(twin.student)) < 1e-5


def test_dae_with_one_teacher_for_all_is_kd(tmp_path: Any) -> None:
    teacher, data = tiny.model(seed=2, hidden=48), tiny.rows(8)
    one = kd(tmp_path, data, tiny.model(seed=1), teacher)
    other = dae(tmp_path, data, tiny.model(seed=1), teachers={"shop": teacher}, reference=teacher)
    loss, gradient = loss_and_gradient(one, micro_batches(one, 4))
    same, too = loss_and_gradient(other, micro_batches(other, 4))
    assert same == pytest.approx(loss, rel=1e-6)
    assert relative(too, gradient) < 1e-6


def uneven_rows() -> Dataset:
    """Eight rows: short and long answers, and two neighbours (a micro-batch of 2) with nothing to learn."""
    made = []
    for index, kept in enumerate([1, 9, 0, 0, 3, 12, 5, 1]):
        ids = [3 + (5 * index + step) % 40 for step in range(14)]
        made.append(
            {"input_ids": ids, "labels": [-100] * (14 - kept) + ids[14 - kept :], "domain": ("shop", "general")[index % 2]}
        )
    return Dataset.from_list(made)


class WithMaskedRows:
    """Trains on ``uneven_rows`` as they are: preparation would leave out the rows with nothing to learn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("daekit.trainers.data.fit_to_length", lambda dataset, *_: (dataset, {}))
        # rows in their own order, so that the fully masked ones meet in one micro-batch
        monkeypatch.setattr("transformers.Trainer._get_train_sampler", lambda *_: torch.utils.data.SequentialSampler(range(8)))


@pytest.mark.parametrize("method", [kd, dae])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_accumulation_equals_the_big_batch(method: Any, kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    WithMaskedRows(monkeypatch)
    results = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = method(
            tmp_path,
            uneven_rows(),
            tiny.model(kind, seed=1),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            ce_weight=0.5,
        )
        before = weights(trainer.model)
        trainer.train()
        assert trainer.state.global_step == 1
        results.append((weights(trainer.model) - before, logged(trainer, "loss")[0], logged(trainer, "kl")[0]))
    for change, loss, kl in results[1:]:
        assert relative(change, results[0][0]) < 1e-5
        assert (loss, kl) == pytest.approx(results[0][1:], rel=1e-5)


@pytest.mark.parametrize("method", [kd, dae])
def test_a_micro_batch_without_kept_tokens_gives_zero(method: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    WithMaskedRows(monkeypatch)
    trainer = method(tmp_path, uneven_rows(), ce_weight=0.5)
    empty = micro_batches(trainer, 2)[1]
    assert (empty["labels"] == -100).all()
    loss, gradient = loss_and_gradient(trainer, [empty])
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("method", [kd, dae])
def test_packed_equals_unpacked(method: Any, tmp_path: Any) -> None:
    data, student = tiny.rows(24), tiny.model(seed=1)
    plain, packed = (
        method(tmp_path, data, copy.deepcopy(student), **changes) for changes in ({}, {"packing": True, "max_length": 32})
    )
    blocks = micro_batches(packed, 100)[0]
    assert blocks["input_ids"].shape[0] == 1 and len(packed.train_dataset) < 24
    assert sorted(blocks["domains"]) == sorted(data["domain"])  # a domain per document, several blocks of both domains
    loss, gradient = loss_and_gradient(plain, micro_batches(plain, 24))
    for size in (100, 3):
        other, too = loss_and_gradient(packed, micro_batches(packed, size))
        assert other == pytest.approx(loss, rel=1e-5)
        assert relative(too, gradient) < 1e-5


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_the_token_mean_per_domain(packing: bool, tmp_path: Any) -> None:
    data, student, expert, general = tiny.rows(11), tiny.model(seed=1), tiny.model(seed=3, hidden=48), tiny.model(seed=4)
    trainer = dae(
        tmp_path,
        data,
        student,
        teachers={"shop": expert},
        reference=general,
        ce_weight=0.5,
        eval_dataset=data,
        packing=packing,
        max_length=32,
        per_device_eval_batch_size=2,
    )
    twin = Twin(in_float64(student), {"shop": in_float64(expert), "general": in_float64(general)}, trainer.args)
    unpacked = dae(tmp_path, data, tiny.model(seed=1), reference=general).train_dataset
    loss, totals = twin(unpacked)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for domain, total in totals.items():
        assert metrics[f"eval_tokens/{domain}"] == total.tokens
        assert metrics[f"eval_kl/{domain}"] == pytest.approx(total.divergence / total.tokens, rel=1e-5)
        assert metrics[f"eval_ce/{domain}"] == pytest.approx(total.ce / total.tokens, rel=1e-5)
        assert metrics[f"eval_mean_token_accuracy/{domain}"] == pytest.approx(total.correct / total.tokens)


def test_logged_values_are_token_means_over_the_window(tmp_path: Any) -> None:
    """Learning rate 0: five steps of unequal token counts, logged in windows of two, must add up to the whole set."""
    data, student, teacher = tiny.rows(10), tiny.model(seed=1), tiny.model(seed=2)
    trainer = kd(
        tmp_path, data, student, teacher, learning_rate=0.0, logging_steps=2, per_device_train_batch_size=2, temperature=2.0
    )
    twin = Twin(in_float64(student), dict.fromkeys(("shop", "general"), in_float64(teacher)), trainer.args)
    _, totals = twin(trainer.train_dataset)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(history) == 3  # steps 2 and 4, and the rest at the end
    for domain, total in totals.items():
        windows = [entry for entry in history if f"kl/{domain}" in entry]
        assert sum(entry[f"tokens/{domain}"] for entry in windows) == total.tokens
        for name, expected in (("kl", total.divergence), ("ce", total.ce), ("mean_token_accuracy", total.correct)):
            summed = sum(entry[f"{name}/{domain}"] * entry[f"tokens/{domain}"] for entry in windows)
            assert summed == pytest.approx(expected, rel=1e-5)


def test_router_loss_is_zero_unless_set_and_then_that_of_trl(tmp_path: Any) -> None:
    """TRL scores the padding of the vocabulary too, so its CE is another one: what the router adds is compared."""
    losses: dict[tuple[bool, float | None], float] = {}
    routers: list[float] = []
    for trainer_class, config_class in ((DomainSFTTrainer, DomainSFTConfig), (SFTTrainer, SFTConfig)):
        ours = trainer_class is DomainSFTTrainer
        for weight in (None, 0.5) if ours else (0.0, 0.5):
            changes = {} if weight is None else {"router_aux_loss_coef": weight}
            config = config_class(**options(tmp_path, bf16=False, gradient_accumulation_steps=2, **changes))
            student = tiny.model("mixtral", seed=1, router_aux_loss_coef=0.7)
            trainer = trainer_class(student, config, train_dataset=tiny.rows(8), processing_class=tiny.tokenizer())
            trainer.train()
            losses[ours, weight] = logged(trainer, "loss")[0]
            routers += logged(trainer, "aux_loss")
    added = losses[True, 0.5] - losses[True, None]
    assert added > 0.1
    assert losses[True, None] == pytest.approx(logged_ce(tmp_path), rel=1e-5)
    assert added == pytest.approx(losses[False, 0.5] - losses[False, 0.0], rel=1e-4)
    assert routers[0] == pytest.approx(routers[1], rel=1e-5)


def logged_ce(folder: Any) -> float:
    """The CE of the Mixtral student above, without any router loss."""
    trainer = kd(folder, tiny.rows(8), tiny.model("mixtral", seed=1), ce_weight=1.0, prediction_weight=0.0)
    loss, _ = loss_and_gradient(trainer, micro_batches(trainer, 8))
    return loss


def test_autocast_holds_inside_student_teacher_and_loss(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    for name, model in (("student", student), ("teacher", teacher)):
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                module.register_forward_hook(lambda _module, _inputs, output, name=name: seen[name].add(output.dtype))
    heads: list[torch.dtype] = []
    original = loss_module.prediction_loss

    def spying(hidden: Tensor, *rest: Any, **named: Any) -> Any:
        heads.append(compute_dtype(hidden))
        return original(hidden, *rest, **named)

    monkeypatch.setattr(loss_module, "prediction_loss", spying)
    trainer = kd(tmp_path, tiny.rows(8), student, teacher, bf16=True, eval_dataset=tiny.rows(4))
    for dtypes in seen.values():
        dtypes.clear()  # of the check of the head when the trainer is made
    trainer.train()
    trainer.evaluate()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert set(heads) == {torch.bfloat16}
    loss = trainer.compute_loss(trainer.model_wrapped, micro_batches(trainer, 4)[0])
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("method", [kd, dae])
def test_normalised_by_rows_each_row_counts_the_same(method: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the twin, which is asked for the mean of each row alone; accumulation equals the big batch."""
    WithMaskedRows(monkeypatch)
    results = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        student = tiny.model(seed=1)
        trainer = method(
            tmp_path, uneven_rows(), student, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            ce_weight=0.5, divergence="reverse_kl", normalize="rows", eval_dataset=uneven_rows(),
        )  # fmt: skip
        teachers = {
            domain: in_float64(trainer.teacher.model if method is kd else trainer.teacher.routes[domain].model)
            for domain in ("general", "shop")
        }
        twin = Twin(in_float64(student), teachers, trainer.args)
        means = [twin([row])[0] for row in uneven_rows() if any(label != -100 for label in row["labels"][1:])]
        expected = torch.stack(means).mean()
        expected.backward()
        loss, gradient = loss_and_gradient(trainer, micro_batches(trainer, size))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert relative(gradient, gradients(twin.student)) < 1e-5
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        before = weights(trainer.model)
        trainer.train()
        results.append((weights(trainer.model) - before, logged(trainer, "loss")[0], logged(trainer, "reverse_kl_rows")[0]))
    for change, loss, kl in results[1:]:
        assert relative(change, results[0][0]) < 1e-5
        assert (loss, kl) == pytest.approx(results[0][1:], rel=1e-5)


def test_a_row_cannot_be_counted_in_pieces_or_by_its_attention(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="'wrapped' cuts rows in two"):
        kd(tmp_path, tiny.rows(8), normalize="rows", packing=True, packing_strategy="wrapped")
    with pytest.raises(UserError, match="normalize=rows is for ce_weight and prediction_weight"):
        kd(tmp_path, tiny.rows(8), normalize="rows", hidden_weight=1.0)
