"""Teachers that are no models in training: what a cache and labels can be asked for."""

from __future__ import annotations

from daekit.recipe.model import TeacherSpec
from daekit.recipe.schema import DAEStage, KDStage
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors, dotted


def check_cache(teacher: TeacherSpec, path: Path, errors: Errors) -> None:
    """Note what a cache does not take."""
    cache = teacher.cache
    if cache is None:
        return
    if teacher.labels:
        errors.add_check((*path, "cache"), "labels are in the rows already; remove it")
    for key, keep in (("k", "top_k"), ("draws", "sampled")):
        if cache.changed(key) and cache.keep is not None and cache.keep != keep:
            errors.add_check((*path, "cache", key), f"belongs to keep: {keep}, not to {cache.keep}")


def check_served(stage: KDStage | DAEStage, path: Path, errors: Errors) -> None:
    """Note what caches and labels do not serve: features of layers; other divergences and temperatures."""
    loss = stage.loss
    for key, teacher in stage.teachers_by_key().items():
        what = "labels" if teacher.labels else "a cache" if teacher.cache is not None else None
        if what is None:
            continue
        where = dotted((*path, *key))
        if loss.on_policy:
            reason = "no teacher that could score" if teacher.labels else "what its teacher said of rows that were there, not"
            message = f"{what} ({where}) has {reason} what the student is yet to write; set it to 0, or give the teacher itself"
            errors.add_check((*path, "loss", "on_policy"), message)
        for weight in ("attention_weight", "hidden_weight"):
            if getattr(loss, weight) > 0:
                reason = "no layers" if teacher.labels else "distributions alone, not what layers did"
                message = f"{what} ({where}) has {reason}; set it to 0" + ("" if teacher.labels else ", or leave `cache` out")
                errors.add_check((*path, "loss", weight), message)
        drawn = teacher.labels or (teacher.cache is not None and teacher.cache.keep == "sampled")
        if drawn and (loss.divergence != "forward_kl" or loss.temperature != 1.0):
            message = (
                f"{'labels' if teacher.labels else 'drawn tokens'} ({where}) give forward_kl at temperature 1 only; use it"
            )
            errors.add_check((*path, "loss", "divergence" if loss.divergence != "forward_kl" else "temperature"), message)
