"""What a training asks of any teacher before its first step, also through ensembles and routes.

Beside what ``Teacher`` demands, a teacher may have the methods of the protocols below; where it has none, nothing is asked.
So a new kind of teacher says itself what it needs, and no list of kinds exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.models.teacher_view import TOKEN_COLUMNS
from daekit.protocol import Teacher
from daekit.recipe.objective import Objective
from daekit.recipe.schema import ModelSpec
from daekit.teachers.cache.rows import CacheRow, rows_of_examples

Domains = frozenset[str] | None  # None: all


@runtime_checkable
class CompositeTeacher(Teacher, Protocol):
    """A teacher that is made of others."""

    def parts(self) -> list[tuple[Teacher, str | None]]:
        """(teacher, the domain whose rows follow it; None: all rows) of each part."""
        ...

    def with_parts(self, change: Callable[[Teacher], Teacher]) -> Teacher:
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


@runtime_checkable
class TeacherOnStudent(Teacher, Protocol):
    """Names a teacher that is made on the student once the trainer has wrapped it: an adapter of its base, its frozen copy."""

    def require_student(self, has_adapter: bool, base: ModelSpec | None) -> None:
        """Raise UserError where it cannot be made on the student, whose weights may not be loaded yet.

        Args:
            has_adapter: whether the student is or will be a PEFT model.
            base: the student, if it is yet to be loaded.
        """
        ...

    def on_student(self, student: nn.Module, vocab_size: int) -> Teacher:
        """The teacher itself."""
        ...


@runtime_checkable
class TeacherOfModels(Teacher, Protocol):
    """A teacher that holds whole models, whose ends must know the rows' tokens and whose layers must keep packed rows apart."""

    def frozen_models(self) -> list[tuple[str, PreTrainedModel]]:
        """Its models, each with its name; not those of its student's own base."""
        ...


def leaves(teacher: Teacher) -> dict[Teacher, Domains]:
    """The teachers that a teacher is made of, each once -> the domains whose rows follow it."""
    if not isinstance(teacher, CompositeTeacher):
        return {teacher: None}
    found: dict[Teacher, Domains] = {}
    for part, domain in teacher.parts():
        for leaf, domains in leaves(part).items():
            theirs = domains if domain is None else frozenset([domain])
            before = found.get(leaf, frozenset())
            found[leaf] = None if before is None or theirs is None else before | theirs
    return found


def frozen_models(teacher: Teacher) -> list[tuple[str, PreTrainedModel]]:
    """The models of a teacher, each with its name; not those of its student's own base."""
    return [named for each in leaves(teacher) if isinstance(each, TeacherOfModels) for named in each.frozen_models()]


def require_on_student(teacher: Teacher, has_adapter: bool, base: ModelSpec | None) -> None:
    """Ask every part that is to be made on the student, before the student's weights are loaded; see ``TeacherOnStudent``."""
    for each in leaves(teacher):
        if isinstance(each, TeacherOnStudent):
            each.require_student(has_adapter, base)


def on_student(teacher: Teacher, student: nn.Module, vocab_size: int) -> Teacher:
    """``teacher`` with each part that it names made on the student, once; what names none is returned as it is.

    Raises:
        UserError: what the parts refuse.
    """
    made: dict[Teacher, Teacher] = {}

    def complete(part: Teacher) -> Teacher:
        if part not in made:
            if isinstance(part, TeacherOnStudent):
                made[part] = part.on_student(student, vocab_size)
            elif isinstance(part, CompositeTeacher) and any(isinstance(leaf, TeacherOnStudent) for leaf in leaves(part)):
                made[part] = part.with_parts(complete)
            else:
                made[part] = part
        return made[part]

    return complete(teacher)


def require_served(
    teacher: Teacher, objective: Objective, tokenizer: PreTrainedTokenizerBase, datasets: Sequence[Any] = ()
) -> None:
    """Let every part of a teacher look at the objective, the tokenizer and its rows; see ``DemandingTeacher``."""
    for part, domains in leaves(teacher).items():
        if isinstance(part, DemandingTeacher):
            part.require_served(objective, tokenizer, _rows(datasets, domains))


def _rows(datasets: Sequence[Any], domains: Domains) -> Iterable[CacheRow]:
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            columns = [name for name in TOKEN_COLUMNS if name in dataset.column_names]
            rows = dataset.select_columns(columns).with_format("numpy")
            yield from rows_of_examples(row for row in rows if domains is None or str(row["domain"]) in domains)
