"""What a training asks of any teacher before its first step, also through ensembles and routes.

Besides what ``Teacher`` demands, a teacher may have the methods of the protocols below; where it has none of them, nothing is
asked of it. So a new kind of teacher says of itself what it needs, and no list of kinds exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.protocol import Teacher
from daekit.recipe.objective import Objective
from daekit.recipe.schema import ModelSpec

Domains = frozenset[str] | None  # None: all


@runtime_checkable
class ComposedTeacher(Teacher, Protocol):
    """A teacher made of others."""

    def parts(self) -> list[tuple[Teacher, Domains]]:
        """The teachers that it is made of, each with the domains whose rows follow it."""
        ...

    def with_parts(self, made_of: Callable[[Teacher], Teacher]) -> Teacher:
        """The same composition of ``made_of(part)`` in the place of each part."""
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
class DemandingTeacher(Teacher, Protocol):
    """A teacher that does not serve every training: a cache, labels."""

    def require_served(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Any]) -> None:
        """Raise UserError unless it serves this objective, tokenizer and tokenised rows."""
        ...


@runtime_checkable
class TeacherOfModels(Teacher, Protocol):
    """A teacher that holds whole models, whose ends must know the rows' tokens and whose layers must keep packed rows apart."""

    def frozen_models(self) -> list[tuple[str, PreTrainedModel]]:
        """Its models, each with its name; not those of its student's own base."""
        ...


def single_teachers(teacher: Teacher, domains: Domains = None) -> dict[Teacher, Domains]:
    """The teachers that a teacher is made of at last, itself if it is not composed -> the domains whose rows follow each."""
    if not isinstance(teacher, ComposedTeacher):
        return {teacher: domains}
    found: dict[Teacher, Domains] = {}
    for part, theirs in teacher.parts():
        for each, own in single_teachers(part, domains if theirs is None else theirs).items():
            before = found.get(each, frozenset())
            found[each] = None if before is None or own is None else before | own
    return found


def frozen_models(teacher: Teacher) -> list[tuple[str, PreTrainedModel]]:
    """The models of a teacher, each with its name; not those of its student's own base."""
    return [named for each in single_teachers(teacher) if isinstance(each, TeacherOfModels) for named in each.frozen_models()]


def require_on_student(teacher: Teacher, has_adapter: bool, base: ModelSpec | None) -> None:
    """Ask every part that is to be made on the student, before the student's weights are loaded; see ``TeacherOnStudent``."""
    for each in single_teachers(teacher):
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
            elif isinstance(part, ComposedTeacher) and any(isinstance(t, TeacherOnStudent) for t in single_teachers(part)):
                made[part] = part.with_parts(complete)
            else:
                made[part] = part
        return made[part]

    return complete(teacher)


def require_served(
    teacher: Teacher, objective: Objective, tokenizer: PreTrainedTokenizerBase, datasets: Sequence[Any] = ()
) -> None:
    """Every part of a teacher serves the objective, the tokenizer and the rows that follow it.

    Args:
        teacher: any.
        objective: the student's.
        tokenizer: the student's.
        datasets: tokenised rows with a column ``domain``; rows of streams are left to the steps that meet them.

    Raises:
        UserError: what the parts refuse, see ``DemandingTeacher``.
    """
    known = [dataset for dataset in datasets if isinstance(dataset, Dataset)]
    for part, domains in single_teachers(teacher).items():
        if isinstance(part, DemandingTeacher):
            part.require_served(objective, tokenizer, (row for dataset in known for row in _of_domains(dataset, domains)))


def _of_domains(dataset: Dataset, domains: Domains) -> Iterable[Mapping[str, Any]]:
    columns = [name for name in ("input_ids", "labels", "seq_lengths", "domain") if name in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("numpy")
    return (row for row in rows if domains is None or str(row["domain"]) in domains)
