"""From a recipe to live objects: the only room that knows both."""

from daekit.build.data import DataBuilder
from daekit.build.folders import RunFolder, StageFolder, read_file
from daekit.build.models import ModelBuilder
from daekit.build.report import build_report
from daekit.build.student import build_student
from daekit.build.trainer import build_trainer

__all__ = [
    "DataBuilder",
    "ModelBuilder",
    "RunFolder",
    "StageFolder",
    "build_report",
    "build_student",
    "build_trainer",
    "read_file",
]
