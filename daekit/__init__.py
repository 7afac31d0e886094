"""daekit: distil a large language model into a small one, then align it to a domain without forgetting the rest.

Public names are imported on first use, because importing trl takes about ten seconds and ``daekit --help`` must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from daekit.evaluation.callback import EvaluationCallback
    from daekit.protocol import (
        Batch,
        Features,
        FeatureSpec,
        FeatureTeacher,
        Member,
        OutputHead,
        Teacher,
        TeacherOutput,
        TopK,
    )
    from daekit.recipe import load_recipe, load_suite
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
        ServerTeacher,
        write_cache,
    )
    from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer, KDConfig, KDTrainer

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
    "FeatureSpec",
    "FeatureTeacher",
    "Features",
    "KDConfig",
    "KDTrainer",
    "LabelTeacher",
    "Member",
    "ModelTeacher",
    "OutputHead",
    "RoutedTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherOutput",
    "TopK",
    "__version__",
    "load_recipe",
    "load_suite",
    "run_recipe",
    "write_cache",
]

_MODULES = ("recipe", "protocol", "teachers", "trainers", "evaluation.callback", "runtime.run")  # what imports little first


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        found = importlib.import_module(f"daekit.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module 'daekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
