"""daekit: distil a large language model into a small one, then align it to a domain without forgetting the rest.

Public names are imported on first use, because importing trl takes about ten seconds and ``daekit --help`` must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from daekit.evaluation.callback import EvaluationCallback
    from daekit.protocol import Batch, Member, Teacher, TeacherOutput
    from daekit.recipe import load_recipe
    from daekit.recipe.load import load_suite
    from daekit.runtime.run import run_recipe
    from daekit.teachers import (
        BASE,
        AdapterPath,
        AdapterTeacher,
        CachedTeacher,
        EnsembleTeacher,
        LabelTeacher,
        ModelTeacher,
        RoutedTeacher,
        write_cache,
    )
    from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer, KDConfig, KDTrainer

_ROOM_OF = {
    "KDConfig": "daekit.trainers",
    "KDTrainer": "daekit.trainers",
    "DAEConfig": "daekit.trainers",
    "DAETrainer": "daekit.trainers",
    "DomainSFTConfig": "daekit.trainers",
    "DomainSFTTrainer": "daekit.trainers",
    "ModelTeacher": "daekit.teachers",
    "AdapterPath": "daekit.teachers",
    "AdapterTeacher": "daekit.teachers",
    "BASE": "daekit.teachers",
    "CachedTeacher": "daekit.teachers",
    "ServerTeacher": "daekit.teachers",
    "EnsembleTeacher": "daekit.teachers",
    "LabelTeacher": "daekit.teachers",
    "RoutedTeacher": "daekit.teachers",
    "write_cache": "daekit.teachers",
    "Batch": "daekit.protocol",
    "TeacherOutput": "daekit.protocol",
    "Teacher": "daekit.protocol",
    "Member": "daekit.protocol",
    "EvaluationCallback": "daekit.evaluation.callback",
    "load_recipe": "daekit.recipe",
    "load_suite": "daekit.recipe.load",
    "run_recipe": "daekit.runtime.run",
}

__all__ = [
    "BASE",
    "AdapterPath",
    "AdapterTeacher",
    "Batch",
    "CachedTeacher",
    "DAEConfig",
    "DAETrainer",
    "DomainSFTConfig",
    "DomainSFTTrainer",
    "EnsembleTeacher",
    "EvaluationCallback",
    "KDConfig",
    "KDTrainer",
    "LabelTeacher",
    "Member",
    "ModelTeacher",
    "RoutedTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherOutput",
    "__version__",
    "load_recipe",
    "load_suite",
    "run_recipe",
    "write_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'daekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
