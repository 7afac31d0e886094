"""What the caches of a stage's teachers take: bytes on the disk per loss token, and memory while they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daekit.planning.meta_model import MetaModel
from daekit.recipe.model import CacheSpec


@dataclass(frozen=True)
class CachePlan:
    """The cache of one teacher.

    Attributes:
        teacher: The key of the recipe, ``teachers.shop``.
        token_bytes: Bytes on the disk per loss token of the rows; of drawn tokens an estimate.
        head_bytes: Bytes of the output heads, once.
        making: Bytes of the weights that are in memory while it is made, before the student is loaded.
    """

    teacher: str
    token_bytes: int
    head_bytes: int
    making: int


def cache_plan(key: str, cache: CacheSpec, members: Sequence[MetaModel]) -> CachePlan:
    """The plan of the cache of a teacher with these members."""
    from daekit.teachers.cache.values import CacheFormat  # imports PEFT

    form = CacheFormat(cache.keep, cache.k, cache.draws)
    heads = [(member.head.shape[1], member.head.element_size(), member.head.numel()) for member in members]
    kept = sum(size * values for _, size, values in heads) if cache.keep == "hidden" else 0
    models = {id(member): sum(p.bytes for p in member.parameters() if not p.adapter) for member in members}
    return CachePlan(key, form.token_bytes([width * size for width, size, _ in heads]), kept, sum(models.values()))
