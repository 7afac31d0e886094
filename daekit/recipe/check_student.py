"""Checks of a student that is made from its teacher (``student: {from: ...}``)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from daekit.errors import listed, nearest
from daekit.recipe.model import ModelSpec, StudentSearchSpec, StudentSpec
from daekit.recipe.paths import check_known
from daekit.recipe.schema import Recipe, StageSpec
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def models_of_student(spec: StudentSpec, path: Path) -> Iterator[tuple[Path, ModelSpec]]:
    """The models that a student is made from, with their key paths."""
    if spec.from_ is not None:
        yield (*path, "from"), spec.from_
    for index, model in enumerate(spec.with_):
        if model is not None:
            yield (*path, "with", index), model


def check_student(recipe: Recipe, stage: StageSpec, spec: StudentSpec, path: Path, errors: Errors) -> None:
    """Note what contradicts itself in how a student is made; whether its teacher can be cut so is seen later."""
    _check_way(spec, path, errors)
    for model_path, model in models_of_student(spec, path):
        if model.quantization is not None:
            message = "a student cannot be made of quantised weights; load them in 16 bits (remove quantization)"
            errors.add_check((*model_path, "quantization"), message)
        for key in ("device_map", "offload"):
            if getattr(model, key):
                message = "a student is cut from a teacher that lies on one device as a whole; remove it"
                errors.add_check((*model_path, key), message)
        if model.adapter is not None:
            message = "a student is made of whole models; name the merged one (a stage with lora.merge, or `daekit merge`)"
            errors.add_check((*model_path, "adapter"), message)
    if stage.lora is not None:
        message = (
            "a part of a teacher must be trained whole before an adapter can make up for what is missing; remove `lora`, or "
            "train the adapter in a later stage"
        )
        errors.add_check((*path[:-1], "lora"), message)
    for key, size in spec.shape.items():
        if key not in _SIZES:
            errors.add_check((*path, "shape", key), f"is not a size; they are {listed(_SIZES)}{nearest(key, _SIZES)}")
        elif size < 1:
            errors.add_check((*path, "shape", key), f"{size} must be at least 1")
    if spec.search is not None:
        _check_search(spec.search, spec.calibration.tokens, (*path, "search"), errors)
    check_known(spec.calibration.sources, recipe.sources, "source", (*path, "calibration", "sources"), errors)


def _check_way(spec: StudentSpec, path: Path, errors: Errors) -> None:
    """One way of making it, and no settings that would do nothing."""
    cuts = [key for key in ("shape", "search") if getattr(spec, key)]
    ways = [key for key, given in (("with", spec.with_), ("keep_experts", spec.keep_experts), ("dense", spec.dense)) if given]
    if len(cuts) > 1:
        errors.add_check((*path, "search"), "finds the shape: remove `shape`, or `search`")
    if len(ways) > 1 or (cuts and ways and ways != ["dense"]):
        errors.add_check(path, f"{listed([*ways, *cuts])} exclude each other (only `dense` goes with a shape or a search)")
    if not ways and not cuts:
        message = "says not what to make of its teacher: give a `shape`, a `search`, `dense`, `keep_experts` or `with`"
        errors.add_check(path, message)
    for key in ("importance", "fit_norms") if not cuts else ():
        if spec.changed(key):
            errors.add_check((*path, key), "belongs to a student cut by `shape` or `search`; remove it")


def _check_search(search: StudentSearchSpec, tokens: int, path: Path, errors: Errors) -> None:
    window = search.parameters
    if window is not None and (len(window) != 2 or not 0 < window[0] <= window[1]):
        errors.add_check((*path, "parameters"), f"{listed(map(str, window))}: wants [smallest, largest] number of parameters")
    if not search.tokens or min(search.tokens) < 1 or any(later <= earlier for earlier, later in pairwise(search.tokens)):
        errors.add_check((*path, "tokens"), "wants numbers that rise from stage to stage, such as [2048, 16384]")
    elif search.tokens[-1] > tokens:
        message = (
            f"the last stage wants {search.tokens[-1]} tokens, but calibration.tokens is {tokens}; raise that, or lower this"
        )
        errors.add_check((*path, "tokens"), message)
    if search.strategy == "grid" and search.granularity == "fine":
        message = "a grid over a fine space would never end; use granularity: coarse, or evolution"
        errors.add_check((*path, "strategy"), message)
