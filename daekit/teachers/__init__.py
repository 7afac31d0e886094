"""Teachers: a frozen model, an adapter of the student's base, a cache, a server, labels; averaged, or one per domain."""

from daekit.teachers.adapter import BASE, AdapterPath, AdapterTeacher, OnStudent
from daekit.teachers.cache.cached import CachedTeacher
from daekit.teachers.cache.write import write_cache
from daekit.teachers.ensemble import EnsembleTeacher
from daekit.teachers.labels import LabelTeacher
from daekit.teachers.model import ModelTeacher
from daekit.teachers.routed import RoutedTeacher, unknown_domain
from daekit.teachers.server import ServerTeacher

__all__ = [
    "BASE",
    "AdapterPath",
    "AdapterTeacher",
    "CachedTeacher",
    "EnsembleTeacher",
    "LabelTeacher",
    "ModelTeacher",
    "OnStudent",
    "RoutedTeacher",
    "ServerTeacher",
    "unknown_domain",
    "write_cache",
]
