"""The models of one stage: its student, and the frozen models that it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daekit.errors import UserError
from daekit.planning.meta_model import MetaModel
from daekit.planning.resolve import ModelResolver
from daekit.planning.trace import Tracer
from daekit.recipe.adapter_config import ADAPTER_CONFIG, BARE_BASE, adapter_stage, read_adapter_config
from daekit.recipe.model import SPREADS
from daekit.recipe.schema import STUDENT_AS_IT_WAS, CacheSpec, LoraSpec, ModelSpec, Recipe, TeacherSpec
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
    """Makes the meta models of a recipe, equal ones once."""

    def __init__(self) -> None:
        self._tracers: dict[str, Tracer] = {}

    def stage(self, recipe: Recipe, name: str, gpu: bool = True) -> StageModels:
        """The models of a stage of a recipe, or of a changed recipe.

        Args:
            recipe: A resolved recipe.
            name: The stage's name.
            gpu: Whether the student is on a GPU; on a CPU, host memory is the student's memory, too.

        Raises:
            UserError: See ``daekit.planning.resolve`` and ``daekit.planning.meta_model``.
        """
        stage, resolver = recipe.stages[name], ModelResolver(recipe)
        spec, lora = student_of(recipe, name)
        student = self._tracer(resolver, spec, lora, trained=True)
        frozen, cached = [], []
        seen: set[str] = set()
        for path, teacher in stage.teachers_by_key().items():
            key = dotted(path)
            if repr(teacher) in seen:  # the run loads equal teachers once
                continue
            seen.add(repr(teacher))
            if teacher.cache is not None:
                models = [spec] if teacher.kind == "student" else list(teacher.models().values())  # none of a server
                members = [student if each.adapter else self._tracer(resolver, each, None, trained=False) for each in models]
                cached.append(CachedTeacherModels(path, teacher.cache, tuple(members)))
                continue
            for who, each in _members(key, teacher):
                if each.adapter is not None:
                    size = self._adapter_bytes(recipe, resolver, spec, each.adapter)
                    frozen.append(FrozenModel(who, student, size, key, adapter=True))
                else:
                    frozen.append(self._loaded(resolver, each, who, key, gpu))
        if stage.type == "dae" and stage.reference is None:  # the student as it is at the start
            own = sum(p.bytes for p in student.meta.parameters() if p.adapter)
            copy = FrozenModel("reference", student, own, "reference", adapter=True)
            frozen.append(copy if lora is not None else self._loaded(resolver, spec, "reference", "reference", gpu))
        return StageModels(student, tuple(frozen), tuple(cached), in_parts(spec, lora))

    def evaluated(self, recipe: Recipe) -> dict[str, MetaModel]:
        """Name -> each model of the report whose shape is known; adapters count as their base."""
        found, resolver = {}, ModelResolver(recipe)
        for model in recipe.evaluation.models if recipe.evaluation is not None else ():
            of_stage = model.stage or adapter_stage(model.adapter)
            if model.name == STUDENT_AS_IT_WAS:
                of_stage = next(iter(recipe.stages))
            try:
                if of_stage is not None:
                    found[model.name] = self._tracer(resolver, *student_of(recipe, of_stage), trained=True).meta
                elif model.adapter is None:
                    found[model.name] = self._tracer(resolver, model, None, trained=False).meta
            except UserError:  # another model than those of the stages, which is not known here
                continue
        return found

    def writer(self, recipe: Recipe, source: str) -> MetaModel | None:
        """The model that writes a source (of an adapter its base); None of one whose shape is not known."""
        spec, resolver = recipe.sources[source].generated, ModelResolver(recipe)
        assert spec is not None
        origin = spec.model.stage or adapter_stage(spec.model.adapter)
        try:
            if spec.model.url is not None:
                return None
            if origin is not None:
                return self._tracer(resolver, *student_of(recipe, origin), trained=True).meta
            if spec.model.adapter is None:
                return self._tracer(resolver, spec.model, None, trained=False).meta
            from daekit.models.adapters import base_spec  # imports PEFT

            return self._tracer(resolver, base_spec(spec.model), None, trained=False).meta
        except UserError:
            return None

    def _loaded(self, resolver: ModelResolver, spec: ModelSpec, who: str, key: str, gpu: bool) -> FrozenModel:
        tracer = self._tracer(resolver, spec, None, trained=False)
        layers = [sum(p.bytes for p in layer) for layer in tracer.meta.layers]
        ends = sum(p.bytes for p in tracer.meta.outside)
        if spec.offload and gpu:  # two layers at a time are on the student's device
            return FrozenModel(who, tracer, ends + 2 * max(layers), key)
        devices = spec.device_map.values() if isinstance(spec.device_map, dict) else [spec.device_map or "0"]
        if gpu and not any(device in _SAME_GPU or device in SPREADS for device in devices):
            return FrozenModel(who, tracer, 0, key)
        # transformers spreads the model over the devices that it finds; one that a mapping spreads counts as a whole
        movable = isinstance(spec.device_map, dict) or spec.device_map in SPREADS
        parts = in_parts(spec) and not spec.whole
        return FrozenModel(who, tracer, ends + sum(layers), key, movable=movable, in_parts=parts, whole=spec.whole)

    def _adapter_bytes(self, recipe: Recipe, resolver: ModelResolver, base: ModelSpec, adapter: str) -> int:
        """Bytes of an adapter on the student's base; 0 for the base itself."""
        if adapter == BARE_BASE:
            return 0
        meta = self._tracer(resolver, base, lora_of(recipe, adapter), trained=True).meta
        return sum(p.bytes for p in meta.parameters() if p.adapter)

    def _tracer(self, resolver: ModelResolver, spec: ModelSpec, lora: LoraSpec | None, trained: bool) -> Tracer:
        resolved = resolver.resolve(spec)
        fields = {name: value for name, value in vars(resolved).items() if name != "config"}
        key = repr((resolved.config.to_json_string(), fields, lora, trained))
        if key not in self._tracers:
            self._tracers[key] = Tracer(MetaModel(resolved, lora, trained))
        return self._tracers[key]


def in_parts(spec: ModelSpec, lora: LoraSpec | None = None) -> bool:
    """Whether each rank reads its part of a model under FSDP2 and ZeRO-3, as far as a recipe tells."""
    merged = spec.path is not None and (Path(spec.path).expanduser() / ADAPTER_CONFIG).is_file()
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
