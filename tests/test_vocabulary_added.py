"""Added tokens that not every model knows: Gemma 3's token for images, of which its smallest models have no row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from daekit.errors import UserError
from daekit.models.heads import output_head
from daekit.models.scoring import score_rows
from daekit.models.vocabulary import vocabulary_size
from daekit.trainers import KDConfig, KDTrainer
from tests.helpers import tiny
from tests.helpers.trainer_world import gradients, options

V = len(tiny.WORDS)


def with_image_token() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def trainer(folder: Any, student: int, teacher: int, tokenizer: Any, rows: Any, **changes: Any) -> KDTrainer:
    """A student and a teacher with so many rows."""
    return KDTrainer(
        model=tiny.model(seed=1, vocab_size=student),
        teacher=tiny.model(seed=2, hidden=48, vocab_size=teacher),
        args=KDConfig(**options(folder, ce_weight=0.5, **changes)),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def test_the_size_and_the_least_number_of_columns() -> None:
    size = vocabulary_size(with_image_token())
    assert (size, size.least) == (V + 1, V) and vocabulary_size(tiny.tokenizer()).least == V
    with_role = tiny.tokenizer()
    with_role.add_special_tokens({"eos_token": "<end>"})
    assert vocabulary_size(with_role).least == V + 1
    assert output_head(tiny.model(vocab_size=V), size).vocab_size == V
    with pytest.raises(UserError, match=f"{V - 1} columns"):
        output_head(tiny.model(vocab_size=V - 1), size)


@pytest.mark.parametrize(("student", "teacher"), [(V, V), (V, V + 5), (V + 5, V)], ids=["270M", "4B to 1B", "1B to 4B"])
def test_the_loss_is_that_without_the_token(student: int, teacher: int, tmp_path: Any) -> None:
    rows, found = tiny.rows(6), []
    for tokenizer in (with_image_token(), tiny.tokenizer()):
        one = trainer(tmp_path, student, teacher, tokenizer, rows)
        inputs = one.data_collator([one.train_dataset[i] for i in range(6)])
        one.compute_loss(one.model, inputs).backward()
        found.append(gradients(one.model))
    assert torch.equal(*found) and found[0].norm() > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("models", [(V, V + 5), (V + 5, V)])
def test_a_row_that_uses_the_token_is_named(models: tuple[int, int], stream: bool, tmp_path: Any) -> None:
    rows = [{"prompt": "w1 ", "completion": "w2"}, {"prompt": "w1 <image> ", "completion": "w2"}]
    data = IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows))) if stream else Dataset.from_list(rows)
    with pytest.raises(UserError, match=r"row 1: token '<image>' \(id 43\)"):
        trainer(tmp_path, *models, with_image_token(), data, max_steps=1).train()
    trainer(tmp_path, V + 1, V + 1, with_image_token(), data, max_steps=1).train()


def test_scores_against_a_model_with_other_columns() -> None:
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}]
    narrow, wide = tiny.model(seed=1, vocab_size=V), tiny.model(seed=2, vocab_size=V + 5)
    size = vocabulary_size(with_image_token())
    expected = score_rows(narrow, rows, vocab_size=V, teacher=wide)
    found = score_rows(narrow, rows, vocab_size=size, teacher=wide)
    assert found.kl_R.tolist() == expected.kl_R.tolist()
