"""Domain Alignment from Expert: each row follows the teacher of its domain, rows of reference domains the frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.backbone import base_of, frozen_copy
from daekit.models.split_loading import another, waits
from daekit.protocol import Teacher
from daekit.teachers import AdapterTeacher, ModelTeacher, OnStudent, RoutedTeacher, unknown_domain
from daekit.trainers.config import DAEConfig
from daekit.trainers.distributed import reads_parts
from daekit.trainers.given import arguments_of, as_teacher, tokenizer_of
from daekit.trainers.kd import KDTrainer


class DAETrainer(KDTrainer):
    """``KDTrainer`` that chooses the teacher by the row's ``domain`` (arXiv 2406.19112, stage two).

    Args:
        model: the student, as for SFTTrainer.
        teachers: domain -> directory or hub id, model, ``AdapterPath`` or ``BASE`` (adapters of a LoRA student's own base), or
            any Teacher.
        reference: what rows of ``args.reference_domains`` follow. None: the student as it stands now, frozen; for a LoRA
            student that is a copy of its adapter on the same base, otherwise a copy of the model.
        args: a DAEConfig.
        train_dataset: rows in any of TRL's forms, with a column ``domain``.
        processing_class: the tokenizer; default: the student's own.
        sft_arguments: further arguments of SFTTrainer.

    Raises:
        UserError: no ``domain`` column, a domain without a teacher, a teacher without rows, teachers that are no mapping, and
            what KDTrainer refuses.
    """

    _tag_names = ["trl", "daekit", "dae"]
    _name = "DAE"
    config_class = DAEConfig
    default_domain = None

    def __init__(
        self,
        model: Any,
        teachers: Mapping[str, str | PreTrainedModel | Teacher],
        reference: str | PreTrainedModel | Teacher | None = None,
        args: DAEConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **sft_arguments: Any,
    ) -> None:
        args = arguments_of(type(self), args, model)
        if not isinstance(teachers, Mapping):
            raise UserError(f"teachers: is a {type(teachers).__name__}; name the domain of each: {{'shop': teacher}}")
        reference_domains = args.reference_domains
        evaluated = sft_arguments.get("eval_dataset")
        others = evaluated.values() if isinstance(evaluated, Mapping) else [evaluated]
        _check_domains(teachers, reference_domains, [train_dataset, *others])
        tokenizer = processing_class or tokenizer_of(model, args)
        given = dict(teachers) | dict.fromkeys(reference_domains, _StudentAsItStands() if reference is None else reference)
        read_here = any(isinstance(each, str | Path) for each in given.values())  # what was loaded before is said already
        split = read_here and reads_parts(args)
        # a teacher of several domains is loaded once, and runs once per batch
        loaded = {each: as_teacher(each, tokenizer, model, split) for each in dict.fromkeys(given.values())}
        self._domains = list(given)
        routed = RoutedTeacher({domain: loaded[each] for domain, each in given.items()})
        super().__init__(model, routed, args, train_dataset, tokenizer, **sft_arguments)


class _StudentAsItStands(OnStudent):
    """The student when its training begins, frozen."""

    def require_student(self, *_: object) -> None:
        """Any student has a copy."""

    def on_student(self, student: nn.Module, vocab_size: int) -> Teacher:
        """A copy of its adapter on the same base, or of the whole model."""
        if isinstance(student, PeftModel):
            return AdapterTeacher.copy_of_active(student, "daekit_reference", vocab_size)
        base = base_of(student)
        return ModelTeacher(another(base) if waits(base) else frozen_copy(base), vocab_size, "reference")


def _check_domains(teachers: Mapping[str, object], reference_domains: list[str], datasets: list[Any]) -> None:
    """The first of ``datasets`` is trained on, the others are evaluated on."""
    if not teachers:
        raise UserError("teachers is empty: DAE needs the expert of at least one domain, {domain: teacher}")
    both = sorted(set(teachers) & set(reference_domains))
    if both:
        raise UserError(f"domain {both[0]!r} has a teacher and is in reference_domains: a row can follow only one of them")
    known = dict.fromkeys([*teachers, *reference_domains])
    present = [_domains_of(dataset) for dataset in datasets]
    for domain in (domain for domains in present for domain in domains):
        if isinstance(domain, str) and domain not in known:
            raise unknown_domain(domain, known)
    idle = [domain for domain in teachers if domain not in present[0]]
    if idle and present[0] and all(isinstance(domain, str) for domain in present[0]):  # others are told with their rows
        raise UserError(
            f"the teacher of domain {idle[0]!r} has no rows: the data set has {', '.join(map(repr, present[0]))}. "
            "Add rows of that domain, or leave the teacher out."
        )


def _domains_of(dataset: Any) -> list[Any]:
    """The domains of a data set in the order of their first rows; none where they are not known beforehand."""
    if not isinstance(dataset, Dataset) or "domain" not in dataset.column_names:
        return []
    return list(dict.fromkeys(dataset["domain"]))
