"""The models of one stage: its student, and the frozen models that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from daekit.errors import UserError
from daekit.planning.meta_model import MetaModel
from daekit.planning.resolve import resolve
from daekit.planning.trace import Tracer
from daekit.recipe.adapter_config import BARE_BASE, adapter_stage, holds_adapter, read_adapter_config
from daekit.recipe.model import SPREADS
from daekit.recipe.schema import CacheSpec, LoraSpec, ModelSpec, Recipe, TeacherSpec
from daekit.recipe.tree import KeyPath
from daekit.recipe.validation import dotted

_SAME_GPU = ("0", "cuda", "cuda:0")  # the GPU of the first process


@dataclass(frozen=True)
class FrozenModel:
    """A teacher or reference of a stage.

    Attributes:
        name: Its name in the plan.
        tracer: The tracer of its model; the student's, where it is an adapter on the student's base.
        bytes: Bytes of its weights; of the adapter alone, where it is one.
        teacher: The key of the recipe that it belongs to; the members of an ensemble share one, and run on the same rows.
        adapter: Whether it is an adapter on the student's base.
        movable: Whether ``device_map`` may put part of it on another device.
        in_parts: Whether each rank reads its part of it where FSDP2 or ZeRO-3 splits it.
        whole: Whether each device holds it whole, whatever the engine.
    """

    name: str
    tracer: Tracer
    bytes: int
    teacher: str
    adapter: bool = False
    movable: bool = False
    in_parts: bool = False
    whole: bool = False

    @property
    def meta(self) -> MetaModel:
        """Its model, without weights."""
        return self.tracer.meta


@dataclass(frozen=True)
class CachedTeacherModels:
    """A teacher that is read from a cache: its key below the stage, what is kept, the models that make it."""

    key: KeyPath
    cache: CacheSpec
    members: tuple[Tracer, ...]


@dataclass(frozen=True)
class StageModels:
    """The student of a stage and its frozen models."""

    student: Tracer
    frozen: tuple[FrozenModel, ...]
    cached: tuple[CachedTeacherModels, ...] = ()  # they are not in memory while the student trains
    student_in_parts: bool = False  # see ``FrozenModel``

    @property
    def teachers(self) -> list[list[FrozenModel]]:
        """The frozen models by teacher: one, or all members of an ensemble."""
        keys = dict.fromkeys(model.teacher for model in self.frozen)
        return [[model for model in self.frozen if model.teacher == key] for key in keys]


class ModelPlanner:
    """Makes the meta models of recipes, equal ones once.

    Args:
        gpu: Whether the student is on a GPU; on a CPU, host memory is the student's memory, too.
    """

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._tracers: dict[str, Tracer] = {}

    def stage(self, recipe: Recipe, name: str) -> StageModels:
        """The models of a stage of a resolved recipe.

        Raises:
            UserError: See ``daekit.planning.resolve`` and ``daekit.planning.meta_model``.
        """
        stage = recipe.stages[name]
        spec, lora = student_of(recipe, name)
        student = self._tracer(recipe, spec, lora, trained=True)
        frozen, cached = [], []
        seen: set[str] = set()
        for path, teacher in stage.teachers_by_key().items():
            key = dotted(path)
            if repr(teacher) in seen:  # the run loads equal teachers once
                continue
            seen.add(repr(teacher))
            if teacher.cache is not None:
                models = [spec] if teacher.kind == "student" else list(teacher.models().values())  # none of a server
                members = [student if each.adapter else self._tracer(recipe, each) for each in models]
                cached.append(CachedTeacherModels(path, teacher.cache, tuple(members)))
                continue
            for who, each in _members(key, teacher):
                if each.adapter is not None:
                    size = self._adapter_bytes(recipe, spec, each.adapter)
                    frozen.append(FrozenModel(who, student, size, key, adapter=True))
                else:
                    frozen.append(self._loaded(recipe, each, who, key))
        if stage.type == "dae" and stage.reference is None:  # the student as it is at the start
            copy = FrozenModel("reference", student, student.meta.adapter_bytes, "reference", adapter=True)
            frozen.append(copy if lora is not None else self._loaded(recipe, spec, "reference", "reference"))
        return StageModels(student, tuple(frozen), tuple(cached), in_parts(spec, lora))

    def writer(self, recipe: Recipe, spec: ModelSpec, stage: str | None = None) -> MetaModel | None:
        """A model that writes texts outside the stages, of an adapter its base; None where its shape is not known.

        Args:
            stage: The stage whose student it is, unless ``spec`` says so.
        """
        origin = stage or spec.stage or adapter_stage(spec.adapter)
        try:
            if origin is not None:
                return self._tracer(recipe, *student_of(recipe, origin), trained=True).meta
            if spec.adapter is not None:
                from daekit.models.adapters import base_spec  # imports PEFT

                spec = base_spec(spec)
            return self._tracer(recipe, spec).meta
        except UserError:
            return None

    def _loaded(self, recipe: Recipe, spec: ModelSpec, who: str, key: str) -> FrozenModel:
        tracer, gpu = self._tracer(recipe, spec), self._gpu
        if spec.offload and gpu:  # two layers at a time are on the student's device
            largest = max(sum(p.bytes for p in layer) for layer in tracer.meta.layers)
            return FrozenModel(who, tracer, sum(p.bytes for p in tracer.meta.outside) + 2 * largest, key)
        devices = spec.device_map.values() if isinstance(spec.device_map, dict) else [spec.device_map or "0"]
        if gpu and not any(device in _SAME_GPU or device in SPREADS for device in devices):
            return FrozenModel(who, tracer, 0, key)
        # transformers spreads the model over the devices that it finds; one that a mapping spreads counts as a whole
        movable = isinstance(spec.device_map, dict) or spec.device_map in SPREADS
        parts = in_parts(spec) and not spec.whole
        return FrozenModel(who, tracer, tracer.meta.weight_bytes, key, movable=movable, in_parts=parts, whole=spec.whole)

    def _adapter_bytes(self, recipe: Recipe, base: ModelSpec, adapter: str) -> int:
        """Bytes of an adapter on the student's base; 0 for the base itself."""
        if adapter == BARE_BASE:
            return 0
        return self._tracer(recipe, base, lora_of(recipe, adapter), trained=True).meta.adapter_bytes

    def _tracer(self, recipe: Recipe, spec: ModelSpec, lora: LoraSpec | None = None, trained: bool = False) -> Tracer:
        resolved = resolve(recipe, spec)
        key = repr((resolved, lora, trained))
        if key not in self._tracers:
            self._tracers[key] = Tracer(MetaModel(resolved, lora, trained), self._gpu)
        return self._tracers[key]


def in_parts(spec: ModelSpec, lora: LoraSpec | None = None) -> bool:
    """Whether each rank reads its part of a model under FSDP2 and ZeRO-3, as far as a recipe tells."""
    merged = spec.path is not None and holds_adapter(spec.path)
    placed = spec.quantization or spec.offload or spec.device_map is not None or spec.trust_remote_code
    return not (placed or merged or spec.config is not None or (lora is not None and lora.use_dora))


def student_of(recipe: Recipe, name: str) -> tuple[ModelSpec, LoraSpec | None]:
    """(the base of a stage's student, the adapter that is trained on it).

    A student that continues the adapter of an earlier stage has that stage's base.
    """
    spec, lora = recipe.stages[name].student, recipe.stages[name].lora
    assert spec is not None, "a resolved recipe names every student"
    if spec.adapter is None:
        return spec, lora
    origin = adapter_stage(spec.adapter)
    if origin is not None:
        return student_of(recipe, origin)
    from daekit.models.adapters import base_spec  # imports PEFT

    return base_spec(spec), lora_of(recipe, spec.adapter)


def lora_of(recipe: Recipe, adapter: str) -> LoraSpec | None:
    """The settings of an adapter that an earlier stage trains, or that a directory holds."""
    origin = adapter_stage(adapter)
    if origin is not None:
        return student_of(recipe, origin)[1]
    config = read_adapter_config(adapter)
    targets = config.get("target_modules") or ()
    return LoraSpec(
        r=config.get("r", 8),
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=config.get("use_dora", False),
    )


def _members(key: str, teacher: TeacherSpec) -> list[tuple[str, ModelSpec]]:
    """(name in the plan, model) of a teacher, or of every member of an ensemble."""
    label = key.replace("teachers.", "teacher ", 1)
    models = enumerate(teacher.models().values(), start=1)
    return [(f"{label} {index}" if teacher.kind == "ensemble" else label, model) for index, model in models]
