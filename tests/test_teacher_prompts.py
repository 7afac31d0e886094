"""Teachers that are told more: the loss is the plain formula; routes, ensembles, adapters, caches and packing are as before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from daekit.data.preparation import fit_to_length
from daekit.errors import UserError
from daekit.models.scoring import score_rows
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, as_teacher_sees
from daekit.teachers import BASE, AdapterPath, CachedTeacher, EnsembleTeacher, ModelTeacher, write_cache
from daekit.trainers import KDConfig
from daekit.trainers.prepared import prepared_rows
from tests import reference
from tests.helpers import tiny
from tests.helpers.adapter_world import load, merged, save_adapter, save_base
from tests.helpers.cache_cases import V, model_teacher
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
    options,
    relative,
    sft,
    weights,
)

EXACT = dict(pad_to_multiple_of=64, num_train_epochs=2)


def told_rows(count: int = 12, seed: int = 0, every: int = 1) -> Dataset:
    """Rows whose teacher sees other and more words; only every so manieth of them."""
    rng, data = random.Random(seed + 100), tiny.rows(count, seed)
    prompts = [tiny.words(rng, 4, 20) + " " if row % every == 0 else None for row in range(count)]
    return data.add_column("teacher_prompt", prompts)


def as_own_prompt(data: Dataset) -> Dataset:
    return data.add_column("teacher_prompt", data["prompt"])


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("every", [1, 2], ids=["all", "mixed"])
def test_the_loss_is_the_plain_formula(every: int, packing: bool, tmp_path: Path) -> None:
    data, student = told_rows(every=every), tiny.model(seed=1)
    expert, frozen = tiny.model(seed=3, hidden=48), tiny.model(seed=4)
    how: dict[str, Any] = dict(ce_weight=0.3, temperature=1.7, divergence="skew_kl")
    rows = [dict(row) for row in dae(tmp_path, data, **how).train_dataset]
    twin = in_float64(student)
    trainer = dae(
        tmp_path, data, student, teachers={"shop": expert}, reference=frozen, packing=packing, packing_strategy="bfd", **how
    )
    value, gradient = loss_and_gradient(trainer, micro_batches(trainer, 4))
    wanted, totals = Twin(twin, {"shop": in_float64(expert), "general": in_float64(frozen)}, trainer.args)(rows)
    wanted.backward()
    assert value == pytest.approx(wanted.item(), rel=1e-5)
    assert relative(gradient, gradients(twin)) < 1e-5
    metrics = trainer.evaluate(data)
    for domain, total in totals.items():
        assert metrics[f"eval_skew_kl/{domain}"] == pytest.approx(total.divergence / total.tokens, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_own_prompt_is_the_run_without_it_to_the_bit(packing: bool, tmp_path: Path) -> None:
    data = tiny.rows(12)
    runs = [
        dae(tmp_path / str(number), each, packing=packing, num_train_epochs=2)
        for number, each in enumerate((data, as_own_prompt(data)))
    ]
    for run in runs:
        run.train()
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


def test_accumulation_is_a_big_batch(tmp_path: Path) -> None:
    trainer = dae(tmp_path, told_rows(every=2))
    small, big = (loss_and_gradient(trainer, micro_batches(trainer, size)) for size in (3, 12))
    assert small[0] == pytest.approx(big[0], rel=1e-5)
    assert relative(small[1], big[1]) < 1e-5


def test_labels_alone_do_not_see_it(tmp_path: Path) -> None:
    runs = [sft(tmp_path / str(number), each) for number, each in enumerate((tiny.rows(12), told_rows()))]
    for run in runs:
        run.train()
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))


def test_a_run_with_other_teacher_prompts_is_another_run(tmp_path: Path) -> None:
    runs = [
        kd(tmp_path, tiny.rows(12).add_column("teacher_prompt", [prompt] * 12)) for prompt in ("w1 w2 ", "w1 w3 ", "w1 w2 ")
    ]
    facts = [run.checkpoints.facts() for run in runs]
    assert facts[0] != facts[1]
    assert facts[0] == facts[2]


# ---- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "packing"), [("hidden", False), ("top_k", True), ("sampled", False)])
def test_a_cache_is_of_what_the_teacher_sees(keep: str, packing: bool, tmp_path: Path) -> None:
    data, teacher = told_rows(every=2), model_teacher()
    args = KDConfig(**options(tmp_path, packing=packing, packing_strategy="bfd"))
    rows = prepared_rows(tiny.tokenizer(), args, data, told_rows(4, seed=3))
    write_cache(teacher, rows, tmp_path / "cache", tokenizer=tiny.tokenizer(), keep=keep, k=V - 1)
    cached = CachedTeacher(tmp_path / "cache")
    how = dict(EXACT, packing=packing, packing_strategy="bfd", eval_strategy="epoch", eval_dataset=told_rows(4, seed=3))
    live, other = (kd(tmp_path / name, data, teacher=each, **how) for name, each in (("a", teacher), ("b", cached)))
    for run in (live, other):
        run.train()
    if keep == "hidden":
        assert torch.equal(weights(live.model), weights(other.model))
        assert logged(live, "eval_kl") == logged(other, "eval_kl")
    elif keep != "sampled":
        assert relative(weights(live.model), weights(other.model)) < 1e-4
    with pytest.raises(UserError, match=r"12 of 12 rows are not in this cache"):
        kd(tmp_path / "c", tiny.rows(12).add_column("teacher_prompt", ["w1 w2 "] * 12), teacher=cached)


def test_adapters_are_whole_models(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden=64)
    adapter, data = save_adapter(tmp_path / "adapter", base), told_rows(every=2)
    runs = []
    for teachers in (
        dict(teachers={"shop": AdapterPath(str(adapter))}, reference=BASE),
        dict(teachers={"shop": merged(base, adapter)}, reference=load(base)),
    ):
        torch.manual_seed(0)
        runs.append(dae(tmp_path, data, load(base), peft_config=lora(), **teachers))
    values = [loss_and_gradient(run, micro_batches(run, 4)) for run in runs]
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    for run in runs:
        run.train()
    assert relative(weights(runs[0].model), weights(runs[1].model)) < 1e-5


def test_an_ensemble_of_one_is_that_teacher_and_a_mean_is_the_mean(tmp_path: Path) -> None:
    data, members = told_rows(), [model_teacher(2), model_teacher(3, 32)]
    alone, one, both = (
        kd(tmp_path, data, teacher=teacher)
        for teacher in (members[0], EnsembleTeacher([members[0]]), EnsembleTeacher(members, [0.4, 0.6]))
    )
    batch = micro_batches(both, 12)
    assert alone.compute_loss(alone.model, batch[0]).item() == one.compute_loss(one.model, batch[0]).item()
    total = count = 0.0
    for row in both.train_dataset:
        ids, labels = reference.seen_by_teacher(row["input_ids"], row["labels"], row[TEACHER_PROMPT_IDS])
        kept, theirs = (torch.tensor(each)[1:] != -100 for each in (row["labels"], labels))
        with torch.no_grad():
            logits = [m.model(torch.tensor([ids])).logits[0, :-1, :V][theirs] for m in members]
            student = both.model(torch.tensor([row["input_ids"]])).logits[0, :-1, :V][kept]
        p = (0.4 * logits[0] + 0.6 * logits[1]).softmax(-1)
        total += float((p * (p.log() - student.log_softmax(-1))).sum())
        count += int(kept.sum())
    assert both.compute_loss(both.model, batch[0]).item() == pytest.approx(total / count, rel=1e-4)


def test_the_report_measures_the_distance_to_the_teacher_as_it_taught(tmp_path: Path) -> None:
    rows = [dict(row) for row in kd(tmp_path, told_rows(6)).train_dataset]
    model, teacher = tiny.model(seed=1), tiny.model(seed=2, hidden=48)
    scores = score_rows(model, rows, vocab_size=V, teacher=teacher, batch_size=4)
    config = KDConfig(**options(tmp_path))
    for row, value in zip(rows, scores.kl_R, strict=True):
        _, totals = Twin(in_float64(model), {row["domain"]: in_float64(teacher)}, config)([row])
        assert value == pytest.approx(totals[row["domain"]].divergence, rel=1e-4)
    assert score_rows(model, rows, vocab_size=V, teacher=ModelTeacher(teacher, V)).kl_R == pytest.approx(scores.kl_R, rel=1e-4)


# ---- rows ------------------------------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"prompt": "w2 ", "completion": "w3", "teacher_prompt": "w4 w5 "}, "w4 w5 w3 </s>"),
        (
            {
                "prompt": [user("w2")],
                "completion": [assistant("w3")],
                "teacher_prompt": [user("w4"), assistant("w6"), user("w5")],
            },
            "w0 w4 w1 w6 </s> w0 w5 w1 w3 </s>",
        ),
        ({"messages": [user("w2"), assistant("w3")], "teacher_prompt": "w4 w5"}, "w0 w4 w5 w1 w3 </s>"),
        ({"messages": [user("w2"), assistant("w3")], "teacher_prompt": [user("w7"), user("w4")]}, "w0 w7 w0 w4 w1 w3 </s>"),
    ],
    ids=["texts", "pair", "messages-text", "messages"],
)
def test_every_form_of_rows(row: dict[str, Any], seen: str, tmp_path: Path) -> None:
    made = kd(tmp_path, Dataset.from_list([row])).train_dataset[0]
    told = as_teacher_sees(made)
    assert tiny.tokenizer().decode(told["input_ids"]) == seen
    label = [token for token in told["labels"] if token != -100]
    assert label == [token for token in made["labels"] if token != -100]
    assert tiny.tokenizer().decode(label) == "w3 </s>"


def test_a_packed_block_keeps_each_rows_prompt(tmp_path: Path) -> None:
    data = told_rows(20, every=2)
    plain, packed = (kd(tmp_path, data, packing=packing, packing_strategy="bfd").train_dataset for packing in (False, True))
    wanted = sorted((row["input_ids"], row["labels"], row[TEACHER_PROMPT_IDS]) for row in plain)
    found = []
    for block in packed:
        start = 0
        for length, prompt in zip(block["seq_lengths"], block[TEACHER_PROMPT_IDS], strict=True):
            labels = block["labels"][start : start + length]
            found.append((block["input_ids"][start : start + length], labels, prompt))
            start += length
    assert len(packed) < 20
    assert sorted(found) == wanted


def tokenised(prompt: int, response: int, teacher: int) -> dict[str, Any]:
    ids = list(range(3, 3 + prompt + response))
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "domain": "shop", TEACHER_PROMPT_IDS: [5] * teacher}


def test_the_teachers_longer_sequence_counts() -> None:
    rows = Dataset.from_list([tokenised(2, 4, 0), tokenised(2, 4, 3), tokenised(2, 4, 8), tokenised(2, 4, 20)])
    with pytest.raises(UserError, match=r"2 of 4 rows have more than teacher_max_length=8 .*row 3 with 24\)"):
        fit_to_length(rows, 8, "error", "train")
    with pytest.raises(UserError, match=r"1 of 4 rows have more than teacher_max_length=12"):
        fit_to_length(rows, 8, "error", "train", 12)
    kept, counts = fit_to_length(rows, 8, "drop", "train")
    assert (len(kept), counts["shop"].dropped) == (2, 2)
    kept, counts = fit_to_length(rows, 8, "truncate", "train", 10)
    assert (counts["shop"].truncated, counts["shop"].emptied, counts["shop"].loss_tokens) == (1, 1, 4 + 4 + 2)
    assert [len(as_teacher_sees(row)["input_ids"]) for row in kept if row[TEACHER_PROMPT_IDS]] == [7, 10]
    fit_to_length(rows, None, "error", "train")


def test_responses_that_merge_with_the_prompt_are_counted(tmp_path: Path) -> None:
    data = told_rows(6)
    prompts = [text.strip() if row in (2, 4) else text for row, text in enumerate(data["teacher_prompt"])]
    data = data.remove_columns("teacher_prompt").add_column("teacher_prompt", prompts)
    with pytest.raises(UserError, match=r"2 of 6 rows with a teacher_prompt.*The first: row 2: from its token 1 on it is 'w"):
        kd(tmp_path, data)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"messages": [user("w2"), assistant("w3"), user("w4"), assistant("w5")], "teacher_prompt": "w6"}],
            {},
            "2 stretches of it carry loss",
        ),
        ([{"messages": [user("w2"), assistant("w3"), assistant("w5")], "teacher_prompt": "w6"}], {}, "2 stretches of it carry"),
        ([{"text": "w2 w3", "teacher_prompt": "w6"}], {}, "row 0: has a teacher_prompt, but neither"),
        ([{"prompt": "w2 ", "completion": "w3", "teacher_prompt": [user("w2")]}], {}, "messages and prompt a text"),
        (
            [{"prompt": "w2 ", "completion": "w3", "teacher_prompt": "w4 "}],
            dict(completion_only_loss=False),
            "first token carries loss",
        ),
        ([{"input_ids": [3, 4], "labels": [-100, 4], "teacher_prompt": "w4 "}], {}, "give teacher_prompt_ids instead"),
        (
            [{"prompt": "w2 ", "completion": "w3", "teacher_prompt": "w4 "}],
            dict(attention_weight=1.0),
            "attention_weight=1.0: rows have",
        ),
        (
            [{"prompt": "w2 ", "completion": "w3", "teacher_prompt": "w4 "}],
            dict(hidden_weight=0.5),
            "hidden_weight=0.5: rows have",
        ),
        (
            [{"prompt": "w2 ", "completion": "w3", "teacher_prompt": "w4 "}],
            dict(packing=True, packing_strategy="wrapped"),
            "splits rows",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_followed_is_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        kd(tmp_path, Dataset.from_list(rows), **changes)


def test_a_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stream with teacher_prompt"):
        kd(tmp_path, told_rows().to_iterable_dataset(), max_steps=1)


def test_rows_with_and_without_the_column_are_mixed(tmp_path: Path) -> None:
    """As a recipe's mixture is: a source without the column has nothing in it."""
    told = kd(tmp_path, told_rows(4)).train_dataset
    plain = kd(tmp_path, tiny.rows(4, seed=9)).train_dataset
    names = ["input_ids", "labels", "domain"]
    mixed = concatenate_datasets([told.select_columns([*names, TEACHER_PROMPT_IDS]), plain.select_columns(names)])
    trainer = kd(tmp_path, mixed)
    rows = [dict(row) for row in trainer.train_dataset]
    twin = Twin(in_float64(trainer.model), dict.fromkeys(("shop", "general"), in_float64(trainer.teacher.model)), trainer.args)
    value, _ = loss_and_gradient(trainer, micro_batches(trainer, 3))
    assert value == pytest.approx(twin(rows)[0].item(), rel=1e-5)


def test_on_policy_the_teacher_scores_behind_its_own_prompt(tmp_path: Path) -> None:
    """What the student wrote is the response on both sides."""
    data = told_rows(8, every=2)
    trainer = kd(
        tmp_path, data, on_policy_fraction=0.5, max_new_tokens=5, rollout_buffer=1, max_steps=1, per_device_train_batch_size=8
    )
    seen: list[Any] = []
    outputs = trainer.teacher.outputs

    def recorded(batch: Any, capture: Any = None) -> Any:
        seen.append(batch)
        return outputs(batch, capture)

    trainer.teacher.outputs = recorded
    students: list[Any] = []
    compute = trainer.compute_loss

    def watched(model: Any, inputs: Any, **how: Any) -> Any:
        students.append({key: value for key, value in inputs.items() if key != "for_teacher"})
        return compute(model, inputs, **how)

    trainer.compute_loss = watched
    trainer.train()
    (theirs,), (ours,) = seen, students
    told = {tuple(row[TEACHER_PROMPT_IDS]) for row in trainer.train_dataset if row[TEACHER_PROMPT_IDS]}
    assert sum(ours["row_on_policy"]) == 4
    for row in range(8):
        response = [
            ours["labels"][row][ours["labels"][row] != -100].tolist(),
            theirs.labels_BT[row][theirs.labels_BT[row] != -100].tolist(),
        ]
        assert response[0] == response[1]
        ids = theirs.inputs["input_ids"][row][theirs.row_BT[row] >= 0].tolist()
        prompt = tuple(ids[: len(ids) - len(response[0])])
        own = ours["input_ids"][row][ours["row_ids"][row] >= 0].tolist()
        assert prompt in told or ids == own
    assert {tuple(theirs.inputs["input_ids"][row][: len(p)].tolist()) for row in range(8) for p in told} >= told
    with pytest.raises(
        UserError, match=r"4 of 8 rows have a teacher_prompt of more than teacher_max_length|rows have a teacher_prompt of"
    ):
        kd(tmp_path, data, on_policy_fraction=0.5, max_new_tokens=50, max_length=64, teacher_max_length=52)
