"""Supervised fine-tuning: distillation without a teacher."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from daekit.trainers.config import DomainSFTConfig
from daekit.trainers.kd import KDTrainer


class DomainSFTTrainer(KDTrainer):
    """``KDTrainer`` without a teacher: ``trl.SFTTrainer`` with per-domain metrics, whose loss is the cross-entropy.

    Args:
        model: the student, as for SFTTrainer.
        args: a DomainSFTConfig.
        train_dataset: rows in any of TRL's forms; rows without a column ``domain`` are all ``general``.
        sft_arguments: further arguments of SFTTrainer, which refuses an unknown one.
    """

    _tag_names = ["trl", "daekit", "sft"]
    _name = "domain SFT"
    config_class = DomainSFTConfig

    def __init__(
        self,
        model: Any,
        args: DomainSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        **sft_arguments: Any,
    ) -> None:
        super().__init__(model, None, args, train_dataset, **sft_arguments)
