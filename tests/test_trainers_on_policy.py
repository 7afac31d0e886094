"""On-policy training: which rows the student writes, what it writes, what carries loss, and that nothing else depends on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from daekit.data.collator import as_batch, collated_rows
from daekit.errors import UserError
from daekit.runtime.quiet import quieten
from daekit.teachers import LabelTeacher
from tests.helpers import tiny
from tests.helpers.trainer_world import (
    Twin,
    dae,
    gradients,
    in_float64,
    kd,
    logged,
    lora,
    loss_and_gradient,
    micro_batches,
    relative,
    weights,
)
from tests.reference import greedy_answer

EOS = tiny.tokenizer().eos_token_id
ON = {"on_policy_fraction": 1.0, "max_new_tokens": 12, "rollout_buffer": 2}
GREEDY = {"rollout_temperature": 0.0}


def steps_of(trainer: Any) -> list[list[dict[str, Any]]]:
    """Train, and return the micro-batches of each step as they went into the loss."""
    seen: list[list[dict[str, Any]]] = []
    sample = trainer.get_batch_samples

    def watched(*arguments: Any) -> Any:
        batches, items = sample(*arguments)
        seen.append(copy.deepcopy(batches))
        return batches, items

    trainer.get_batch_samples = watched
    trainer.train()
    return seen


def rows_in(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int], bool]]:
    """(ids, labels, whether the student wrote it) of each row."""
    written = as_batch(batch).on_policy or [False] * len(batch["domains"])
    return [(ids, labels, own) for (ids, labels, _), own in zip(collated_rows(batch), written, strict=True)]


def prompt_of(ids: list[int], labels: list[int]) -> list[int]:
    return ids[: next(at for at, label in enumerate(labels) if label != -100)]


@pytest.mark.parametrize("padding_free", [False, True])
def test_greedy_responses_of_a_frozen_student_are_rows_generated_beforehand(padding_free: bool, tmp_path: Any) -> None:
    student, data = tiny.model(seed=1), tiny.rows(8)
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    changes |= {"padding_free": True, "max_length": None} if padding_free else {}
    trainer = kd(tmp_path, data, student, learning_rate=0.0, **ON, **GREEDY, **changes)
    steps = steps_of(trainer)
    twin, prompts = in_float64(tiny.model(seed=1)), {tuple(prompt_of(*row)) for row in zip(*columns(trainer), strict=True)}
    beforehand = []
    for row in (row for step in steps for batch in step for row in zip(rows_in(batch), batch["domains"], strict=True)):
        (ids, labels, written), domain = row
        prompt = prompt_of(ids, labels)
        assert written and tuple(prompt) in prompts
        answer = greedy_answer(twin, prompt, 12, EOS, len(tiny.WORDS))
        assert ids == prompt + answer
        assert labels == [-100] * len(prompt) + answer  # the generated tokens with their end, and nothing else
        beforehand.append({"input_ids": ids, "labels": labels, "domain": domain})
    other = kd(tmp_path, Dataset.from_list(beforehand), tiny.model(seed=1), shuffle_dataset=False)
    loss, gradient = loss_and_gradient(trainer, [batch for step in steps for batch in step])
    same, too = loss_and_gradient(other, micro_batches(other, 2))
    assert loss == pytest.approx(same, rel=1e-6) and relative(gradient, too) < 1e-6


def columns(trainer: Any) -> tuple[list[list[int]], list[list[int]]]:
    return trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]


def test_responses_end_or_are_cut_and_both_are_counted(tmp_path: Any) -> None:
    trainer = kd(tmp_path, tiny.rows(32), logging_steps=8, **ON)
    rows = [row for step in steps_of(trainer) for batch in step for row in rows_in(batch)]
    responses = [[label for label in labels if label != -100] for _, labels, _ in rows]
    ended = [response for response in responses if response[-1] == EOS]
    cut = [response for response in responses if response[-1] != EOS]
    assert ended and cut and all(len(response) == 12 for response in cut)
    assert all(EOS not in response[:-1] for response in responses)
    assert logged(trainer, "rollout_ended") == [pytest.approx(len(ended) / len(rows))]
    assert logged(trainer, "rollout_length") == [pytest.approx(sum(map(len, responses)) / len(rows))]
    assert logged(trainer, "rollout_rows_per_second")[0] > 0
    assert len(set(map(tuple, responses))) > len(rows) / 2  # drawn, not the one most likely answer


def test_nothing_changes_where_no_row_is_on_policy(tmp_path: Any) -> None:
    plain, off = (kd(tmp_path, tiny.rows(16), **change) for change in ({}, {"on_policy_fraction": 0.0, "rollout_buffer": 3}))
    for trainer in (plain, off):
        trainer.train()
    assert torch.equal(weights(plain.model), weights(off.model))
    assert logged(plain, "loss") == logged(off, "loss")
    assert not any("rollout" in key or "on_policy" in key for entry in off.state.log_history for key in entry)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.3])
def test_the_share_of_rows_is_exact(share: float, tmp_path: Any) -> None:
    trainer = kd(tmp_path, tiny.rows(40), **(ON | {"on_policy_fraction": share, "rollout_buffer": 3}))
    written = [written for step in steps_of(trainer) for batch in step for *_, written in rows_in(batch)]
    assert sum(written) == round(share * 40)


def test_each_step_chooses_anew_and_each_row_draws_for_itself(tmp_path: Any) -> None:
    """Equal prompts and a student that stands still: only the seeds of steps and places tell responses and choices apart."""
    data = Dataset.from_list([tiny.rows(1)[0]] * 32)
    trainer = kd(tmp_path, data, learning_rate=0.0, **(ON | {"on_policy_fraction": 0.5}))
    steps = [[row for batch in step for row in rows_in(batch)] for step in steps_of(trainer)]
    chosen = [tuple(place for place, (*_, written) in enumerate(step) if written) for step in steps]
    assert len(steps) == 8 and len(set(chosen)) > 1
    responses = [[tuple(label for label in labels if label != -100) for _, labels, own in step if own] for step in steps]
    assert all(len(set(step)) > 1 for step in responses)
    assert len({tuple(step) for step in responses}) == len(steps)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_teacher_that_is_the_student_gives_loss_0(divergence: str, tmp_path: Any) -> None:
    trainer = dae(
        tmp_path, tiny.rows(8), teachers={"shop": tiny.model(seed=1)}, reference=None, divergence=divergence, max_steps=1, **ON
    )
    trainer.train()
    assert abs(logged(trainer, "loss")[0]) < 1e-9


class Labelled(Twin):
    """The twin whose CE counts on rows with labels alone."""

    def of(self, rows: list[dict[str, Any]], ce_weight: float) -> tuple[Tensor, Any]:
        self.config = copy.copy(self.config)
        self.config.ce_weight = ce_weight
        mean, totals = self(rows)
        return mean * sum(entry.tokens for entry in totals.values()), totals


@pytest.mark.parametrize("method", [kd, dae])
def test_ce_and_accuracy_count_on_rows_with_labels_alone(method: Any, tmp_path: Any) -> None:
    student = tiny.model(seed=1)
    trainer = method(
        tmp_path, tiny.rows(8), student, ce_weight=0.5, divergence="reverse_kl", learning_rate=0.0,
        **(ON | {"on_policy_fraction": 0.5}), max_steps=1, per_device_train_batch_size=8,
    )  # fmt: skip
    [[batch]] = steps_of(trainer)
    rows = [
        {"input_ids": ids, "labels": labels, "domain": domain, "written": written}
        for (ids, labels, written), domain in zip(rows_in(batch), batch["domains"], strict=True)
    ]
    assert sum(row["written"] for row in rows) == 4
    teachers: dict[str, nn.Module] = {
        domain: in_float64(trainer.teacher.model if method is kd else trainer.teacher.routes[domain].model)
        for domain in ("general", "shop")
    }
    twin = Labelled(in_float64(student), teachers, trainer.args)
    labelled, with_labels = twin.of([row for row in rows if not row["written"]], 0.5)
    written, without = twin.of([row for row in rows if row["written"]], 0.0)
    tokens = sum(entry.tokens for totals in (with_labels, without) for entry in totals.values())
    expected = (labelled + written) / tokens
    expected.backward()
    loss, gradient = loss_and_gradient(trainer, [batch])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient, gradients(twin.student)) < 1e-5
    [log] = [entry for entry in trainer.state.log_history if "loss" in entry]
    for totals, names in ((with_labels, ("reverse_kl", "tokens")), (without, ("reverse_kl_on_policy", "tokens_on_policy"))):
        for domain, entry in totals.items():
            assert log[f"{names[0]}/{domain}"] == pytest.approx(entry.divergence / entry.tokens, rel=1e-4)
            assert log[f"{names[1]}/{domain}"] == entry.tokens
    for domain, entry in with_labels.items():
        assert log[f"ce/{domain}"] == pytest.approx(entry.ce / entry.tokens, rel=1e-4)
        assert log[f"mean_token_accuracy/{domain}"] == pytest.approx(entry.correct / entry.tokens)


def test_accumulation_equals_the_big_batch(tmp_path: Any) -> None:
    results = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = kd(
            tmp_path, tiny.rows(16), per_device_train_batch_size=size, gradient_accumulation_steps=steps, ce_weight=0.5,
            num_train_epochs=2, **(ON | {"on_policy_fraction": 0.4, "rollout_buffer": 3}),
        )  # fmt: skip
        before = weights(trainer.model)
        trainer.train()
        results.append((weights(trainer.model) - before, logged(trainer, "loss"), logged(trainer, "kl_on_policy")))
    for change, loss, kl in results[1:]:
        assert relative(change, results[0][0]) < 1e-4
        assert loss == pytest.approx(results[0][1], rel=1e-4) and kl == pytest.approx(results[0][2], rel=1e-4)


def test_an_adapter_learns_alone_and_modes_and_flags_stay(tmp_path: Any) -> None:
    student = tiny.model(seed=1)
    trainer = dae(
        tmp_path, tiny.rows(8), student, reference=None, peft_config=lora(), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **ON,
    )  # fmt: skip
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    before, base = weights(trainer.model), {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    trainer.model.train()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    trainer.rollouts._continued({(0, 0): [4, 5, 6]})
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}
    trainer.train()
    assert flags == {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    assert trainer.model.active_adapter == "default" and not torch.equal(before, weights(trainer.model))
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)
    assert trainer.model.is_gradient_checkpointing


def test_evaluation_during_training_changes_nothing_and_has_no_responses_of_the_student(tmp_path: Any) -> None:
    changes = dict(ON, on_policy_fraction=0.5, max_steps=6)
    plain = kd(tmp_path, tiny.rows(16), **changes)
    watched = kd(tmp_path, tiny.rows(16), eval_strategy="steps", eval_steps=1, eval_dataset=tiny.rows(4, seed=5), **changes)
    for trainer in (plain, watched):
        trainer.train()
    assert torch.equal(weights(plain.model), weights(watched.model))
    evaluations = [entry for entry in watched.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 6 and not any("on_policy" in key for entry in evaluations for key in entry)


def test_a_teacher_that_is_told_more_sees_the_same_responses_behind_its_own_prompt(tmp_path: Any) -> None:
    rows = [dict(row) for row in tiny.rows(8)]
    told = [row | {"teacher_prompt": f"w7 w8 w9 {row['prompt']}" if index % 2 else None} for index, row in enumerate(rows)]
    changes = ON | {"on_policy_fraction": 0.5}
    trainer = kd(
        tmp_path, Dataset.from_list(told), shuffle_dataset=False, per_device_train_batch_size=8, max_steps=1, **changes
    )
    [[batch]] = steps_of(trainer)
    more = [tiny.tokenizer().convert_tokens_to_ids(word) for word in ("w7", "w8", "w9")]
    extra = []
    for (ids, labels, written), (theirs, wanted, _) in zip(rows_in(batch), collated_rows(batch["for_teacher"]), strict=True):
        extra.append((len(theirs) > len(ids), written))
        assert theirs == (more if extra[-1][0] else []) + ids
        assert [label for label in wanted if label != -100] == [label for label in labels if label != -100]
    assert sum(told for told, _ in extra) == sum(written for _, written in extra) == 4
    assert len(set(extra)) > 2  # told more and not, written and not


def text_rows() -> Dataset:
    return Dataset.from_list([{"text": "w1 w2 w3 </s>", "domain": "shop"}] * 8)


def endless_rows() -> Dataset:
    ids = [5, 6, 7, 8, 9]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]], "domain": "shop"}] * 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_length": 16, "max_new_tokens": 12}, r"max_new_tokens=12: \d+ of 8 training rows have a prompt longer than .* 4"),
        ({"max_length": 12}, "max_new_tokens=12: leaves no room for a prompt within max_length=12"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing=True .*'wrapped'.*padding_free"),
        ({"packing": True}, "packing=True .*'bfd'.*padding_free"),
        ({"ce_weight": 1.0, "prediction_weight": 0.0}, "on_policy=1: .*only ce_weight"),
        ({"ce_weight": 1.0}, "ce_weight=1 counts on rows with labels, and on_policy=1 leaves none"),
        ({"on_policy_fraction": 1.5}, "on_policy=1.5"),
        ({"rollout_buffer": 0}, "rollout_buffer=0"),
        ({"rollout_temperature": -1.0}, "rollout_temperature=-1"),
        ({"data": text_rows()}, "8 of 8 training rows have no prompt"),
        ({"data": endless_rows()}, "a response would never end.*'w6'.*'</s>'"),
        ({"data": tiny.rows(8).to_iterable_dataset(), "max_steps": 2}, "with a stream"),
        ({"teacher": LabelTeacher()}, "on_policy=1: what the student writes has no labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_cannot_be_trained_is_told_before_the_first_step(changes: dict[str, Any], says: str, tmp_path: Any) -> None:
    arguments = ON | changes
    data = arguments.pop("data", None)
    with pytest.raises(UserError, match=says):
        kd(tmp_path, tiny.rows(8) if data is None else data, **arguments)


def test_prompts_without_room_for_a_response_are_left_out_where_that_was_asked(tmp_path: Any) -> None:
    """A longer max_length lets longer rows in, so without this no max_length could be large enough."""
    rows = [[*range(5, 5 + prompt), 5, EOS] for prompt in (2, 3, 4, 5, 3, 2)]
    data = Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:], "domain": "shop"} for ids in rows]
    )
    with pytest.raises(UserError, match=r"2 of 6 training rows have a prompt longer than .*overlong: drop"):
        kd(tmp_path, data, **ON | {"max_length": 15})
    trainer = kd(tmp_path, data, **ON | {"max_length": 15, "overlong": "drop"})
    assert sorted(len(ids) for ids in trainer.train_dataset["input_ids"]) == [4, 4, 5, 5]
    trainer.train()


def test_probabilities_that_are_no_numbers_are_an_error(tmp_path: Any) -> None:
    for how in ({}, GREEDY):
        trainer = kd(tmp_path, tiny.rows(8), **ON, **how)
        with torch.no_grad():  # as a step with too high a learning rate leaves it
            trainer.model.get_output_embeddings().weight[3] = torch.nan
        with pytest.raises(UserError, match="NaN or infinite"):
            trainer.train()


def test_responses_that_do_not_fit_into_the_memory_are_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr("daekit.trainers.rollouts.generate", full)
    with pytest.raises(UserError, match=r"rollout_buffer=2: 8 responses at a time.*max_new_tokens=12, do not fit"):
        kd(tmp_path, tiny.rows(8), **ON).train()


def test_a_model_that_never_ends_is_told_of(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    student = tiny.model(seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        student.get_output_embeddings().weight[EOS] = 0
        student.model.norm.weight *= 30
    quieten()  # as a run does
    trainer = kd(tmp_path, tiny.rows(8), student, max_steps=1, **ON, **GREEDY)
    trainer.train()
    assert "none of the 4 responses" in caplog.text and logged(trainer, "rollout_ended") == [0]
