"""Teachers that are no models in training: what a cache, a served model and labels can be asked for."""

from __future__ import annotations

from daekit.recipe.judge import url_problems
from daekit.recipe.model import TeacherSpec
from daekit.recipe.schema import DAEStage, KDStage
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors, dotted


def check_cache(teacher: TeacherSpec, path: Path, errors: Errors) -> None:
    """Note what a cache does not take, and what is wrong with where a teacher is served."""
    cache, server = teacher.cache, teacher.server
    if server is not None and server.base_url is not None:
        for problem in url_problems(server.base_url):
            errors.add_check((*path, "base_url"), problem)
    if cache is None:
        return
    if teacher.labels:
        errors.add_check((*path, "cache"), "labels are in the rows already; remove it")
    if server is not None and cache.keep not in (None, "top_k"):
        message = f"{cache.keep}: a server sends the log-probabilities of its most likely tokens only; use keep: top_k"
        errors.add_check((*path, "cache", "keep"), message)
    if server is not None and server.changed("k"):
        errors.add_check((*path, "k"), "with a cache it is `cache.k`; remove it here")
    for key, keep in (("k", "top_k"), ("draws", "sampled")):
        if cache.changed(key) and cache.keep is not None and cache.keep != keep:
            errors.add_check((*path, "cache", key), f"belongs to keep: {keep}, not to {cache.keep}")


def check_served(stage: KDStage | DAEStage, path: Path, errors: Errors) -> None:
    """Note what these teachers do not serve: features of layers; other divergences and temperatures."""
    loss = stage.loss
    for key, teacher in stage.teachers_by_key().items():
        served = teacher.server is not None
        what = "labels" if teacher.labels else "a server" if served else "a cache" if teacher.cache is not None else None
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
                or_else = ", or leave `cache` out" if what == "a cache" else ""
                errors.add_check((*path, "loss", weight), f"{what} ({where}) has {reason}; set it to 0{or_else}")
        if served and loss.temperature != 1.0:
            message = f"a server ({where}) sends log-probabilities at temperature 1, and a tail cannot be tempered; set it to 1"
            errors.add_check((*path, "loss", "temperature"), message)
        drawn = teacher.labels or (teacher.cache is not None and teacher.cache.keep == "sampled" and not served)
        if drawn and (loss.divergence != "forward_kl" or loss.temperature != 1.0):
            message = (
                f"{'labels' if teacher.labels else 'drawn tokens'} ({where}) give forward_kl at temperature 1 only; use it"
            )
            errors.add_check((*path, "loss", "divergence" if loss.divergence != "forward_kl" else "temperature"), message)
