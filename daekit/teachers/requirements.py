"""What teachers that are no models demand of a training, looked at before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from daekit.models.teacher_view import TOKEN_COLUMNS
from daekit.recipe.objective import Objective
from daekit.teachers.cache import CachedTeacher, rows_of_examples
from daekit.teachers.ensemble import EnsembleTeacher
from daekit.teachers.labels import LabelTeacher
from daekit.teachers.routed import RoutedTeacher

Domains = frozenset[str] | None  # None: all


def require_served(
    teacher: Any, objective: Objective, tokenizer: PreTrainedTokenizerBase, datasets: Sequence[Any] = ()
) -> None:
    """Every cache in a teacher serves the objective, the tokenizer and the rows that follow it; labels serve the objective.

    Args:
        teacher: any.
        objective: the student's.
        tokenizer: the student's.
        datasets: tokenised rows with a column ``domain``; rows of streams are left to the steps that meet them.

    Raises:
        UserError: what a CachedTeacher and a LabelTeacher refuse.
    """
    for part, domains in _parts(teacher, None).items():
        part.require_objective(objective)
        if isinstance(part, CachedTeacher):
            part.require_tokenizer(tokenizer)
            for dataset in datasets:
                if isinstance(dataset, Dataset):
                    part.require_rows(rows_of_examples(_of_domains(dataset, domains)))


def _parts(teacher: Any, domains: Domains) -> dict[CachedTeacher | LabelTeacher, Domains]:
    """Cache or labels -> the domains whose rows follow them."""
    if isinstance(teacher, CachedTeacher | LabelTeacher):
        return {teacher: domains}
    parts: list[tuple[Any, Domains]] = []
    if isinstance(teacher, EnsembleTeacher):
        parts = [(member, domains) for member in teacher.members]
    elif isinstance(teacher, RoutedTeacher):
        parts = [(part, frozenset([domain])) for domain, part in teacher.routes.items()]
    found: dict[CachedTeacher | LabelTeacher, Domains] = {}
    for part, theirs in parts:
        for each, others in _parts(part, theirs).items():
            before = found.get(each, frozenset())
            found[each] = None if before is None or others is None else before | others
    return found


def _of_domains(dataset: Dataset, domains: Domains) -> Iterable[Mapping[str, Any]]:
    columns = [name for name in TOKEN_COLUMNS if name in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("numpy")
    return (row for row in rows if domains is None or str(row["domain"]) in domains)
