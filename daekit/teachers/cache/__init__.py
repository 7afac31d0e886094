"""What a frozen teacher says about fixed rows, kept on disk: written once, read in every epoch. See docs/caches.md."""

from daekit.teachers.cache.cached import CachedTeacher
from daekit.teachers.cache.check import check_cache
from daekit.teachers.cache.rows import CacheRow, rows_of_examples
from daekit.teachers.cache.store import CacheStore, require_facts
from daekit.teachers.cache.write import write_cache

__all__ = [
    "CacheRow",
    "CacheStore",
    "CachedTeacher",
    "check_cache",
    "require_facts",
    "rows_of_examples",
    "write_cache",
]
