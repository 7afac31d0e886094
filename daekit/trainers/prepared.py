"""Rows as a trainer would train on them, without its student: what a cache of its teachers is made from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.teacher_view import TOKEN_COLUMNS
from daekit.models.vocabulary import vocabulary_size
from daekit.trainers.config import DomainSFTConfig, KDConfig
from daekit.trainers.kd import KDTrainer
from daekit.trainers.sft import DomainSFTTrainer


def rows_trainer(
    tokenizer: PreTrainedTokenizerBase, args: DomainSFTConfig, train_dataset: Dataset, eval_dataset: Any = None
) -> KDTrainer:
    """A trainer with the config and rows of a real one and a student of a few thousand parameters: it has the same data sets.

    Raises:
        UserError: rows that the real trainer would refuse.
    """
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config = LlamaConfig(vocab_size=vocabulary_size(tokenizer), **size)
    args = copy.copy(args)
    args.report_to, args.gradient_checkpointing, args.model_init_kwargs = [], False, None
    args.deepspeed_plugin = copy.deepcopy(args.deepspeed_plugin)  # a trainer writes sizes of its student into it
    if isinstance(args, KDConfig):  # there is no teacher to compare with
        args.ce_weight, args.prediction_weight, args.attention_weight, args.hidden_weight = 1.0, 0.0, 0.0, 0.0
        args.on_policy_fraction = 0.0
    given = {"processing_class": copy.deepcopy(tokenizer), "eval_dataset": eval_dataset}
    return DomainSFTTrainer(LlamaForCausalLM(config), args, train_dataset, **given)


def prepared_rows(
    tokenizer: PreTrainedTokenizerBase, args: DomainSFTConfig, train_dataset: Dataset, eval_dataset: Any = None
) -> Iterator[Any]:
    """Tokenised rows, for ``daekit.write_cache``: those that a trainer with ``args`` trains and evaluates on.

    Raises:
        UserError: rows that the trainer would refuse; a stream, whose rows are not known beforehand.
    """
    return rows_of_trainer(rows_trainer(tokenizer, args, train_dataset, eval_dataset))


def rows_of_trainer(trainer: KDTrainer) -> Iterator[Any]:
    """All tokenised rows of a trainer, for training first."""
    evaluated = trainer.eval_dataset
    for dataset in (trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        if dataset is None:
            continue
        if not isinstance(dataset, Dataset):
            raise UserError("a cache is made of a data set that can be read again; this is a stream. Use a map-style Dataset")
        columns = [name for name in TOKEN_COLUMNS if name in dataset.column_names]
        yield from dataset.select_columns(columns).with_format("numpy")
