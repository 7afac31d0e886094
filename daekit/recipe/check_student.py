"""Checks of a student that is made from its teacher (``student: {from: ...}``)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from daekit.recipe.problems import Problems, listed, nearest
from daekit.recipe.schema import ModelSpec, Recipe, StageSpec, StudentSpec
from daekit.recipe.student_schema import StudentSearchSpec
from daekit.recipe.tree import Path

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def models_of_student(spec: StudentSpec, path: Path) -> Iterator[tuple[Path, ModelSpec]]:
    """The models that a student is made from, with their key paths."""
    if spec.from_ is not None:
        yield (*path, "from"), spec.from_
    for index, model in enumerate(spec.with_):
        yield (*path, "with", index), model


def check_student(recipe: Recipe, name: str, stage: StageSpec, problems: Problems) -> None:
    """Note everything in how a student is made that contradicts itself; whether its teacher can be cut so is seen later."""
    spec = stage.student and stage.student.init
    if not spec:
        return
    path: Path = ("stages", name, "student")
    _check_way(spec, path, problems)
    for model_path, model in models_of_student(spec, path):
        if model.quantization is not None:
            message = "a student cannot be made of quantised weights; load them in 16 bits (remove quantization)"
            problems.add_check((*model_path, "quantization"), message)
        for key in ("device_map", "offload"):
            if getattr(model, key):
                message = "a student is cut from a teacher that lies on one device as a whole; remove it"
                problems.add_check((*model_path, key), message)
        if model.adapter is not None:
            message = "a student is made of whole models; name the merged one (a stage with lora.merge, or `daekit merge`)"
            problems.add_check((*model_path, "adapter"), message)
    if stage.lora is not None:
        message = (
            "a part of a teacher must be trained whole before an adapter can make up for what is missing; remove `lora`, or "
            "train the adapter in a later stage"
        )
        problems.add_check(("stages", name, "lora"), message)
    for key, size in spec.shape.items():
        if key not in _SIZES:
            problems.add_check((*path, "shape", key), f"is not a size; they are {listed(_SIZES)}{nearest(key, _SIZES)}")
        elif size is not None and size < 1:
            problems.add_check((*path, "shape", key), f"{size} must be at least 1")
    if spec.search is not None:
        _check_search(spec.search, spec.calibration.tokens, (*path, "search"), problems)
    calibration: Path = (*path, "calibration")
    for key, least in (("tokens", 1), ("max_length", 2)):
        if getattr(spec.calibration, key) < least:
            problems.add_check((*calibration, key), f"{getattr(spec.calibration, key)} must be at least {least}")
    for source in spec.calibration.sources:
        if recipe.sources is not None and source not in recipe.sources:
            message = f"there is no source {source!r} (there are: {listed(recipe.sources)}){nearest(source, recipe.sources)}"
            problems.add_check((*calibration, "sources"), message)


def _check_way(spec: StudentSpec, path: Path, problems: Problems) -> None:
    """One way of making it, and no settings that would do nothing."""
    cuts = [key for key in ("shape", "search") if getattr(spec, key)]
    ways = [key for key, given in (("with", spec.with_), ("keep_experts", spec.keep_experts), ("dense", spec.dense)) if given]
    if len(cuts) > 1:
        problems.add_check((*path, "search"), "finds the shape: remove `shape`, or `search`")
    if len(ways) > 1 or (cuts and ways and ways != ["dense"]):
        problems.add_check(path, f"{listed([*ways, *cuts])} exclude each other (only `dense` goes with a shape or a search)")
    if not ways and not cuts:
        message = "says not what to make of its teacher: give a `shape`, a `search`, `dense`, `keep_experts` or `with`"
        problems.add_check(path, message)
    if not cuts:
        for key in ("importance", "fit_norms"):
            if getattr(spec, key) != getattr(StudentSpec, key):
                problems.add_check((*path, key), "belongs to a student cut by `shape` or `search`; remove it")
    if spec.keep_experts is not None and spec.keep_experts < 1:
        problems.add_check((*path, "keep_experts"), f"{spec.keep_experts} must be at least 1")


def _check_search(search: StudentSearchSpec, tokens: int, path: Path, problems: Problems) -> None:
    window = search.parameters
    if window is not None and (len(window) != 2 or not 0 < window[0] <= window[1]):
        problems.add_check((*path, "parameters"), f"{listed(map(str, window))}: wants [smallest, largest] number of parameters")
    if not search.tokens or min(search.tokens) < 1 or any(later <= earlier for earlier, later in pairwise(search.tokens)):
        problems.add_check((*path, "tokens"), "wants numbers that rise from stage to stage, such as [2048, 16384]")
    elif search.tokens[-1] > tokens:
        message = (
            f"the last stage wants {search.tokens[-1]} tokens, but calibration.tokens is {tokens}; raise that, or lower this"
        )
        problems.add_check((*path, "tokens"), message)
    for key in ("keep", "smallest"):
        if not 0 < getattr(search, key) <= 1:
            problems.add_check((*path, key), f"{getattr(search, key)} must be above 0 and at most 1")
    for key in ("parts", "candidates"):
        if getattr(search, key) < 1:
            problems.add_check((*path, key), f"{getattr(search, key)} must be at least 1")
    if search.strategy == "grid" and search.granularity == "fine":
        problems.add_check(
            (*path, "strategy"), "a grid over a fine space would never end; use granularity: coarse, or evolution"
        )
