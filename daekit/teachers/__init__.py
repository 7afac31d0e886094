"""Teachers: a frozen model, an adapter of the student's base, several averaged, or one per domain; freely composed."""

from daekit.teachers.adapter import BASE, AdapterPath, AdapterTeacher
from daekit.teachers.ensemble import EnsembleTeacher
from daekit.teachers.model import ModelTeacher
from daekit.teachers.routed import RoutedTeacher, unknown_domain

__all__ = ["BASE", "AdapterPath", "AdapterTeacher", "EnsembleTeacher", "ModelTeacher", "RoutedTeacher", "unknown_domain"]
