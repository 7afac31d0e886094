"""Batches of random rows in every layout."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from daekit.data.collator import DomainCollator, as_batch
from daekit.protocol import Batch

Row = dict[str, Any]


def make_rows(seed: int, count: int, longest: int = 9) -> list[Row]:
    """Token rows of 2 tokens and more with a response somewhere, and a domain each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, 43) for _ in range(rng.randint(2, longest))]
        labels = [token if rng.random() < 0.6 else -100 for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "domain": rng.choice(["general", "shop", "law"])})
    return rows


def pad_left(examples: list[Row]) -> dict[str, Tensor]:
    """A collator of a user's own, of the kind that generation needs."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    examples = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {
        key: torch.tensor([[value] * (longest - len(example[key])) + example[key] for example in examples])
        for key, value in fill.items()
    }


def collate(rows: Sequence[Row], layout: str) -> Batch:
    examples = list(rows)
    if layout == "blocks":  # as packing makes them: rows of one domain in one example
        examples = []
        for domain in dict.fromkeys(row["domain"] for row in rows):
            mine = [row for row in rows if row["domain"] == domain]
            joined = {key: list(itertools.chain(*(row[key] for row in mine))) for key in ("input_ids", "labels")}
            examples.append(joined | {"domain": domain, "seq_lengths": [len(row["input_ids"]) for row in mine]})
    multiple = 8 if layout == "packed to 8" else None
    padding_free = layout not in ("right", "left")
    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple)
    return as_batch(DomainCollator(pad_left if layout == "left" else inner)(examples))
