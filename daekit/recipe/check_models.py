"""Checks of the models of a recipe: where they come from and lie, adapters on one base, students made from a teacher."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path as FilePath

from daekit.errors import UserError, listed, nearest
from daekit.recipe.adapter_config import (
    BARE_BASE,
    adapter_stage,
    read_adapter_config,
    require_same_base,
    require_shareable,
    same_base,
)
from daekit.recipe.check_student import check_student, models_of_student
from daekit.recipe.model import ModelSpec
from daekit.recipe.paths import check_exists
from daekit.recipe.schema import Recipe, StageSpec
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors, dotted

# What takes a place of `device_map`; torch is not imported here to be asked.
_DEVICE = re.compile(r"(cpu|[0-9]{1,4}|(cuda|xpu|npu|hpu|mps)(:[0-9]{1,4})?)")
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def models_of_stage(name: str, stage: StageSpec) -> Iterator[tuple[Path, ModelSpec]]:
    """Every model that a stage names, with its key path."""
    path = ("stages", name)
    if stage.student is not None:
        yield (*path, "student"), stage.student
        if stage.student.init is not None:
            yield from models_of_student(stage.student.init, (*path, "student"))
    for key, teacher in stage.teachers_by_key().items():
        if teacher.model is not None:
            yield (*path, *key), teacher.model
        for index, member in enumerate(teacher.ensemble):
            if member is not None and member.model is not None:
                yield (*path, *key, "ensemble", index, "model"), member.model


def check_models(recipe: Recipe, name: str, stage: StageSpec, errors: Errors) -> None:
    """Note what is wrong with the models of one stage."""
    earlier = earlier_stages(recipe, name)
    if stage.student is None and not earlier:
        message = "the first stage has no stage before it to take the student from; give a path, a config or `from`"
        errors.add_check(("stages", name, "student"), message)
    for path, model in models_of_stage(name, stage):
        student = model is stage.student
        if model.init is not None:
            if not student:
                errors.add_check(
                    path, "only the student of a stage is made `from` another model; make it in a stage of its own"
                )
            continue
        _check_placement(model, path, student, errors)
        own = [key for key in ("path", "stage", "config") if getattr(model, key) is not None]
        if model.adapter is not None:
            _check_adapter_of(recipe, name, path, model, errors)
            if not own or not student:
                continue
        if not own and earlier and student:  # the result of the stage before, loaded as the other keys say
            _check_quantised_result(recipe, earlier[-1], path, model, errors)
        else:
            check_origin(recipe, model, path, errors, list(recipe.stages), earlier, name)
    if stage.student is not None and stage.student.init is not None:
        check_student(recipe, stage, stage.student.init, ("stages", name, "student"), errors)


def check_origin(
    recipe: Recipe, model: ModelSpec, path: Path, errors: Errors, stages: list[str], earlier: list[str], name: str | None
) -> None:
    """Note what is wrong with where a whole model comes from.

    Args:
        recipe: that names it.
        model: the model.
        path: its key path.
        errors: take what is wrong.
        stages: all stages.
        earlier: those that it may be a result of.
        name: the stage that names it; None: the report.
    """
    own = [key for key in ("path", "stage", "config") if getattr(model, key) is not None]
    if len(own) != 1:
        given = f"not {listed(own)}" if own else "it has none of them"
        errors.add_check(path, f"a model needs exactly one of path, stage and config; {given}")
        return
    if model.stage is not None and model.stage not in earlier:
        errors.add_check(path, _why_not_earlier(model.stage, name, stages, earlier))
    elif model.stage is not None:
        _check_quantised_result(recipe, model.stage, path, model, errors)
    check_exists(model.path, path, errors, suffixes=())
    if model.config is not None:
        _check_config(model, path, errors)
    if model.revision is not None and model.path is None:
        errors.add_check((*path, "revision"), "only a model with a `path` has a revision")
    if model.checkpoint is not None and model.stage is None:
        errors.add_check((*path, "checkpoint"), "only a `stage` has checkpoints; a checkpoint elsewhere is a `path`")


def earlier_stages(recipe: Recipe, name: str) -> list[str]:
    """The stages that run before ``name``."""
    names = list(recipe.stages)
    return names[: names.index(name)]


def _check_quantised_result(recipe: Recipe, origin: str, path: Path, model: ModelSpec, errors: Errors) -> None:
    """The result of an earlier stage cannot be quantised where it is an adapter."""
    stage = recipe.stages[origin]
    if model.quantization is not None and is_lora(stage) and not (stage.lora is not None and stage.lora.merge):
        errors.add_check(
            (*path, "quantization"),
            f"the result of stage {origin!r} is an adapter, which is merged into its 16-bit base; name it as "
            f"{{adapter: stage:{origin}}} to run it on a quantized base, or set `lora.merge: true` in stage {origin!r}",
        )


def _why_not_earlier(wanted: str, name: str | None, names: list[str], earlier: list[str]) -> str:
    if wanted == name:
        return f"the stage {name!r} refers to its own result; it can start from an earlier one only"
    if wanted in names:
        return f"the stage {wanted!r} runs after {name!r}; stages run in the order of the file"
    form = "; a checkpoint is written stage:NAME@checkpoint-40" if "@" in wanted else ""
    return f"there is no stage {wanted!r} (earlier ones: {listed(earlier)}){nearest(wanted, earlier)}{form}"


def _check_config(model: ModelSpec, path: Path, errors: Errors) -> None:
    kind = (model.config or {}).get("model_type")
    if not isinstance(kind, str):
        message = "a model from a config needs its `model_type` (mistral, mixtral, llama...)"
        errors.add_check((*path, "config", "model_type"), message)
    elif (known := model_types()) and kind not in known:
        message = f"transformers knows no model_type {kind[:80]!r}{nearest(kind, known)}"
        errors.add_check((*path, "config", "model_type"), message)
    if model.quantization is not None:
        message = f"random weights cannot be quantized; remove `quantization: {model.quantization}`"
        errors.add_check((*path, "quantization"), message)


@cache
def model_types() -> frozenset[str]:
    """The model types of the installed transformers, read from its source; none if that is not there or laid out otherwise."""
    spec = importlib.util.find_spec("transformers")
    places = spec.submodule_search_locations if spec is not None else None
    auto = FilePath(places[0]) / "models" / "auto" if places else None
    files = [] if auto is None else [auto / "auto_mappings.py", auto / "configuration_auto.py"]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    found = {name for text in texts for name in re.findall(r"\"([\w.-]+)\"[,:] \"\w+Config\"", text)}
    return frozenset(found if "mistral" in found else ())


def _check_placement(model: ModelSpec, path: Path, student: bool, errors: Errors) -> None:
    """Where a teacher lies; a student lies where it is trained."""
    where = (*path, "device_map")
    for key in ("device_map", "offload"):
        if student and getattr(model, key):
            message = "belongs to a teacher; a student is trained on the devices that `accelerate launch` gives it"
            errors.add_check((*path, key), message)
    if model.offload and model.device_map is not None:
        errors.add_check((*path, "offload"), "excludes device_map: it brings the layers to the student's device")
    if model.offload and model.quantization == "8bit":
        message = "does not work with quantization: 8bit, whose weights bitsandbytes keeps out of reach; use 4bit or none"
        errors.add_check((*path, "offload"), message)
    if model.device_map is None:
        return
    if model.config is not None:
        errors.add_check(where, "a model made from a config is made where the student is; remove it")
    if not model.device_map:
        errors.add_check(where, "must not be empty; leave it out for the student's device")
    spread = isinstance(model.device_map, str) and model.device_map in _SPREADS
    devices = list(model.device_map.values()) if isinstance(model.device_map, dict) else [model.device_map]
    wrong = [device for device in devices if device and not spread and not _DEVICE.fullmatch(device)]
    if "disk" in wrong:
        message = "disk is not supported: the loss needs weights that are there; use `offload: true` or quantization"
        errors.add_check(where, message)
    elif wrong:
        errors.add_check(where, f"{wrong[0]!r} is no device (cpu, cuda:0, 0...), nor, for a whole model, {listed(_SPREADS)}")


# ---- adapters on one base --------------------------------------------------------------------------------------------


def is_lora(stage: StageSpec | None) -> bool:
    """Whether a stage trains an adapter."""
    return stage is not None and (stage.lora is not None or (stage.student is not None and stage.student.adapter is not None))


def _check_adapter_of(recipe: Recipe, name: str, path: Path, model: ModelSpec, errors: Errors) -> None:
    """Note what is wrong with a model of stage ``name`` that says ``adapter``."""
    stage, where, earlier = recipe.stages[name], (*path, "adapter"), earlier_stages(recipe, name)
    origin = adapter_stage(model.adapter)
    if origin is not None and origin not in earlier:
        errors.add_check(where, _why_not_earlier(origin, name, list(recipe.stages), earlier))
        return
    if origin is not None and recipe.stages[origin] is None:
        return  # it could not be read
    student = model is stage.student
    (_check_continued if student else _check_on_base)(stage, path, model, errors)
    if model.adapter == BARE_BASE:
        if student:
            errors.add_check(where, "a student cannot train the bare base's adapter; leave `adapter` out and give `lora`")
        return
    ours = base_of(recipe, name)
    if origin is not None:
        theirs = base_of(recipe, origin)
        if not is_lora(recipe.stages[origin]):
            errors.add_check(where, f"the stage {origin!r} trains no LoRA adapter; name its result itself: `stage:{origin}`")
        elif ours is not None and theirs is not None and not _may_be_one(ours, theirs):
            errors.add_check(
                where,
                f"the stage {origin!r} trains an adapter of {_name(theirs)}, not of this student's base {_name(ours)}: on "
                "another base it is another model",
            )
        return
    assert model.adapter is not None
    try:
        config = read_adapter_config(model.adapter)
        require_shareable(model.adapter, config)
        if ours is not None and ours.path is not None:
            revisions = (config.get("revision"), ours.revision)
            require_same_base(model.adapter, config["base_model_name_or_path"], ours.path, revisions)
    except UserError as error:
        errors.add_check(where, str(error))


def base_of(recipe: Recipe, name: str) -> ModelSpec | None:
    """The model whose weights a LoRA stage leaves as they are; None where the recipe cannot say."""
    stage = recipe.stages[name]
    if stage is None:
        return None
    student = stage.student or ModelSpec()
    if student.path or student.stage or student.config:
        return student.model_copy(update={"adapter": None})
    origin, earlier = adapter_stage(student.adapter), earlier_stages(recipe, name)
    if origin is not None:
        return base_of(recipe, origin) if origin in earlier else None
    if student.adapter is not None:
        try:
            config = read_adapter_config(student.adapter)
        except UserError:  # noted where the student is checked
            return None
        base = {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
        return student.model_copy(update={"adapter": None, **base})
    return student.model_copy(update={"stage": earlier[-1]}) if earlier else None


def with_base_of(student: ModelSpec, origin: ModelSpec) -> ModelSpec:
    """A student that continues the adapter of a stage, with whatever it does not say of its base taken from that stage."""
    said = {key: getattr(student, key) for key in ModelSpec.model_fields if student.changed(key)}
    return origin.model_copy(update=said)


def sharing_notes(recipe: Recipe) -> list[str]:
    """What a resolved recipe does that its author may not want: a base loaded twice, an adapter on another precision."""
    notes = []
    for name, stage in recipe.stages.items():
        base = base_of(recipe, name) if is_lora(stage) else None
        for key, teacher in stage.teachers_by_key().items():
            model = teacher.model
            origin = None if model is None else adapter_stage(model.adapter) or model.stage
            theirs = base_of(recipe, origin) if origin is not None and is_lora(recipe.stages[origin]) else None
            if model is None or base is None or theirs is None or not _may_be_one(base, theirs):
                continue
            where = dotted(("stages", name, *key))
            if model.adapter is not None and theirs.quantization != base.quantization:
                notes.append(
                    f"{where}: the adapter of stage {origin!r} was trained on a base {_precision(theirs)} and runs on one "
                    f"{_precision(base)}: it is not quite the same model there"
                )
            elif model.adapter is None:
                notes.append(
                    f"{where}: stage {origin!r} is a LoRA adapter of this student's base; as {{stage: {origin}}} it is merged "
                    f"into a second copy of it. {{adapter: stage:{origin}}} runs it on the student's base, loaded once"
                    + (f" ({_precision(base)}, which is not quite the merged model)" if base.quantization else "")
                )
    return notes


def _check_continued(stage: StageSpec, path: Path, student: ModelSpec, errors: Errors) -> None:
    if stage.lora is not None:
        message = "the student goes on with an adapter that has its own rank and targets; remove `lora`, or `student.adapter`"
        errors.add_check((*path[:-1], "lora"), message)
    if student.config is not None:
        errors.add_check((*path, "config"), "an adapter belongs to the base it was trained on, not to random weights")
    if student.path is None and student.revision is not None:
        message = "is a revision of which base? give its `path`, or remove it: the adapter's own base is loaded then"
        errors.add_check((*path, "revision"), message)


def _check_on_base(stage: StageSpec, path: Path, model: ModelSpec, errors: Errors) -> None:
    more = [key for key in ModelSpec.model_fields if model.changed(key) and key != "adapter"]
    if more:
        errors.add_check(
            (*path, more[0]),
            f"an adapter runs on the student's base, as it is loaded there; remove {listed(more)}, or, for a model of its own, "
            "remove `adapter`",
        )
    if not is_lora(stage):
        message = "is an adapter on the student's base, but the student is trained whole; add `lora`, or name a model"
        errors.add_check((*path, "adapter"), message)


def _may_be_one(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two bases can be one model; of a stage and a path nobody knows before the run."""
    if one.path is not None and other.path is not None:
        return same_base(one.path, other.path) and one.revision == other.revision
    if one.stage is not None and other.stage is not None:
        return (one.stage, one.checkpoint) == (other.stage, other.checkpoint)
    return one.config is None and other.config is None


def _precision(base: ModelSpec) -> str:
    return f"in {base.quantization}" if base.quantization else "without quantization"


def _name(base: ModelSpec) -> str:
    revision = f" (revision {base.revision})" if base.revision else ""
    return repr(base.path or (f"stage:{base.stage}" if base.stage else "a config")) + revision
