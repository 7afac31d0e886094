"""Teachers that are made of others, and teachers that demand something of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from daekit.protocol import Teacher
from daekit.recipe.objective import Objective
from daekit.teachers.cache.rows import CacheRow, rows_of_examples

Domains = frozenset[str] | None  # None: all


@runtime_checkable
class CompositeTeacher(Teacher, Protocol):
    """A teacher that is made of others."""

    def parts(self) -> list[tuple[Any, str | None]]:
        """(teacher or AdapterPath, the domain whose rows follow it; None: all rows) of each part."""
        ...

    def with_parts(self, change: Callable[[Any], Any]) -> Teacher:
        """The same with ``change`` of each part in its place; equal parts stay one."""
        ...


@runtime_checkable
class DemandingTeacher(Teacher, Protocol):
    """A teacher that does not serve every objective, tokenizer or row."""

    def require_served(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, rows: Iterable[CacheRow]) -> None:
        """Look at a training before its first step.

        Args:
            objective: the student's.
            tokenizer: the student's.
            rows: those that follow this teacher; rows of streams are left to the steps that meet them.

        Raises:
            UserError: something that it does not serve.
        """
        ...


def leaves(teacher: Any) -> dict[Any, Domains]:
    """The teachers and AdapterPaths that a teacher is made of, each once -> the domains whose rows follow it."""
    if not isinstance(teacher, CompositeTeacher):
        return {teacher: None}
    found: dict[Any, Domains] = {}
    for part, domain in teacher.parts():
        for leaf, domains in leaves(part).items():
            theirs = domains if domain is None else frozenset([domain])
            before = found.get(leaf, frozenset())
            found[leaf] = None if before is None or theirs is None else before | theirs
    return found


def require_served(
    teacher: Any, objective: Objective, tokenizer: PreTrainedTokenizerBase, datasets: Sequence[Any] = ()
) -> None:
    """Let every part of a teacher look at the objective, the tokenizer and its rows; see ``DemandingTeacher``."""
    for part, domains in leaves(teacher).items():
        if isinstance(part, DemandingTeacher):
            part.require_served(objective, tokenizer, _rows(datasets, domains))


def _rows(datasets: Sequence[Any], domains: Domains) -> Iterable[CacheRow]:
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            columns = [name for name in ("input_ids", "labels", "seq_lengths", "domain") if name in dataset.column_names]
            rows = dataset.select_columns(columns).with_format("numpy")
            yield from rows_of_examples(row for row in rows if domains is None or str(row["domain"]) in domains)
