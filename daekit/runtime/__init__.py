"""From a recipe to live objects: the only room that knows both."""

from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import RunFolder
from daekit.runtime.models import ModelBuilder
from daekit.runtime.report import build_report
from daekit.runtime.student import build_student
from daekit.runtime.trainer import build_trainer, cache_stage

__all__ = [
    "DataBuilder",
    "ModelBuilder",
    "RunFolder",
    "build_report",
    "build_student",
    "build_trainer",
    "cache_stage",
]
