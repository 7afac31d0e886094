"""Every form of rows x mask x streaming x packing: the kept tokens are TRL's own, the loss is the float64 formula."""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from daekit.errors import UserError
from daekit.recipe import load_recipe_text
from daekit.runtime.data import DataBuilder
from tests.helpers import tiny
from tests.helpers.trainer_world import Twin, dae, in_float64, kd, logged, options

FORMS_AND_MASKS = [
    ("messages", {}),
    ("messages", {"assistant_only_loss": True}),
    ("messages", {"assistant_only_loss": False}),
    ("prompt_completion", {}),
    ("prompt_completion", {"completion_only_loss": False}),
    ("conversational_prompt_completion", {}),
    ("conversational_prompt_completion", {"completion_only_loss": False}),
    ("conversational_prompt_completion", {"assistant_only_loss": True}),
    ("text", {}),
    ("tokenised", {}),
]
EXPERT, REFERENCE, STUDENT = (lambda: tiny.model(seed=3, hidden=48)), (lambda: tiny.model(seed=4)), (lambda: tiny.model(seed=1))


def rows(form: str, count: int = 7) -> Dataset:
    rng = random.Random(5)
    made: list[dict[str, Any]] = []
    for index in range(count):
        question, answer = tiny.words(rng, 1, 6), tiny.words(rng, 1, 5)
        again, more = tiny.words(rng, 1, 3), tiny.words(rng, 1, 4)
        asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        ids = [tiny.WORDS.index(word) for word in f"{question} {answer}".split()]
        row: dict[str, Any] = {
            "messages": {
                "messages": [asked, answered, {"role": "user", "content": again}, {"role": "assistant", "content": more}]
            },
            "prompt_completion": {"prompt": question + " ", "completion": answer},
            "conversational_prompt_completion": {"prompt": [asked], "completion": [answered]},
            "text": {"text": f"{question} {answer}"},
            "tokenised": {"input_ids": ids, "labels": [-100, *ids[1:]]},
        }[form]
        made.append(row | {"domain": ("shop", "general")[index % 2]})
    return Dataset.from_list(made)


@cache
def prepared_by_trl(form: str, mask: tuple[tuple[str, bool], ...]) -> list[dict[str, Any]]:
    """TRL's own preparation, with the domain of each row."""
    responses = {"assistant_only_loss": True} if form == "messages" else {}  # what daekit does unless told otherwise
    config = SFTConfig(**options(tempfile.mkdtemp(), bf16=False, **(responses | dict(mask))))
    data = SFTTrainer(STUDENT(), config, train_dataset=rows(form), processing_class=tiny.tokenizer()).train_dataset
    return [dict(row) for row in data.select_columns(["input_ids", "labels", "domain"])]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("form", "mask"), FORMS_AND_MASKS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_every_form_mask_stream_and_packing(
    form: str, mask: dict[str, bool], streaming: bool, packing: bool, tmp_path: Any
) -> None:
    data = rows(form)
    student, expert, reference = STUDENT(), EXPERT(), REFERENCE()
    trainer = dae(
        tmp_path,
        data.to_iterable_dataset() if streaming else data,
        student,
        teachers={"shop": expert},
        reference=reference,
        packing=packing,
        per_device_train_batch_size=len(data),  # one step sees every row once
        max_steps=1,
        ce_weight=0.3,
        **mask,
    )
    twin = Twin(in_float64(student), {"shop": in_float64(expert), "general": in_float64(reference)}, trainer.args)
    expected = prepared_by_trl(form, tuple(mask.items()))
    loss, totals = twin(expected)
    trainer.train()
    assert {name: logged(trainer, f"tokens/{name}") for name in totals} == {name: [t.tokens] for name, t in totals.items()}
    assert logged(trainer, "num_tokens")[0] == sum(len(row["input_ids"]) for row in expected)
    assert logged(trainer, "loss")[0] == pytest.approx(float(loss), rel=1e-5)
    for name, total in totals.items():
        assert logged(trainer, f"kl/{name}")[0] == pytest.approx(total.divergence / total.tokens, rel=1e-5)
        assert logged(trainer, f"ce/{name}")[0] == pytest.approx(total.ce / total.tokens, rel=1e-5)
        assert logged(trainer, f"mean_token_accuracy/{name}")[0] == pytest.approx(total.correct / total.tokens)


def test_rows_without_a_domain_are_general_for_kd(tmp_path: Any) -> None:
    data = rows("text").remove_columns("domain")
    for given in (data, data.to_iterable_dataset()):
        trainer = kd(tmp_path, given, max_steps=1)
        trainer.train()
        assert logged(trainer, "tokens/general")


def test_a_packed_stream_never_loses_a_domain_in_silence(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"'shop'.*packing=False"):
        kd(tmp_path, rows("text").to_iterable_dataset(), packing=True, max_steps=2).train()


def test_a_row_of_a_stream_with_an_unknown_domain_is_an_error(tmp_path: Any) -> None:
    data = concatenate_datasets([rows("text"), Dataset.from_list([{"text": "w1 w2", "domain": "shopp"}])]).to_iterable_dataset()
    for packing in (False, True):
        with pytest.raises(UserError, match="'shopp'"):
            dae(tmp_path, data, packing=packing, max_steps=3, num_train_epochs=1).train()


@pytest.mark.parametrize("streaming", [False, True])
def test_overlong_rows(streaming: bool, tmp_path: Any) -> None:
    data = Dataset.from_list(
        [
            {"text": "w1 " * 20, "domain": "shop"},
            {"text": "w2 " * 3, "domain": "shop"},
            {"text": "w3 " * 4, "domain": "general"},
        ]
    )
    given = data.to_iterable_dataset() if streaming else data
    with pytest.raises(UserError, match="max_length=8"):
        dae(tmp_path, given, max_length=8, max_steps=1).train()
    # "w2 w2 w2 </s>" has 3 predictions, the long row 7 when it is cut at 8, "w3 w3 w3 w3 </s>" 4
    for policy, tokens in (("truncate", 3 + 7), ("drop", 3)):
        trainer = dae(tmp_path, given, max_length=8, overlong=policy, max_steps=1)
        trainer.train()
        assert logged(trainer, "tokens/shop") == [tokens]
        assert logged(trainer, "tokens/general") == [4]
        if not streaming:
            count = trainer.data_counts["train"]["shop"]
            assert (count.rows, count.truncated, count.dropped) == ((2, 1, 0) if policy == "truncate" else (1, 0, 1))


def test_a_domain_that_loses_all_its_rows_is_an_error(tmp_path: Any) -> None:
    data = Dataset.from_list([{"text": "w1 " * 20, "domain": "shop"}, {"text": "w3 " * 4, "domain": "general"}])
    with pytest.raises(UserError, match="'shop' loses all its 1 rows"):
        dae(tmp_path, data, max_length=8, overlong="drop")


@pytest.mark.parametrize(("form", "mask"), FORMS_AND_MASKS[:-1])
def test_a_recipe_trains_on_the_tokens_that_a_script_trains_on(form: str, mask: dict[str, bool], tmp_path: Path) -> None:
    rows(form).filter(lambda row: row["domain"] == "shop").remove_columns("domain").to_json(tmp_path / "rows.jsonl")
    text = "{name: a, output_dir: %s/run, tokenizer: %s/tokenizer, sources: {s: {domain: shop, path: %s/rows.jsonl}}, stages: {"
    text += "s: {type: sft, student: {config: {model_type: mistral}}, data: [s], trainer: %s}}}"
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = load_recipe_text(text % (tmp_path, tmp_path, tmp_path, json.dumps(mask)), "a.yaml")
    found = DataBuilder(recipe).mixture(recipe.stages["s"]).dataset
    wanted = [row for row in prepared_by_trl(form, tuple(mask.items())) if row["domain"] == "shop"]
    assert sorted((row["input_ids"], row["labels"]) for row in found) == sorted(
        (row["input_ids"], row["labels"]) for row in wanted
    )
