"""The models of one stage: its student, and everybody who speaks to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from daekit.models.adapters import base_spec, lora_config_of
from daekit.planning.shapes import Shapes
from daekit.planning.skeleton import Skeleton
from daekit.planning.trace import Tracer
from daekit.recipe.adapter_config import BARE_BASE, adapter_stage
from daekit.recipe.schema import LoraSpec, ModelSpec, Recipe, StageSpec

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_SAME_GPU = ("0", "cuda", "cuda:0")  # of the first process


@dataclass(frozen=True)
class Speaker:
    """A frozen model of a stage.

    Attributes:
        name: what the plan calls it.
        tracer: of its model; of the student's where it is an adapter on it.
        bytes: of its weights; of its adapter alone where it is one.
        group: speakers of one group speak for the same rows (an ensemble), those of others for other rows.
        adapter: whether it is an adapter on the student's base.
        movable: whether part of it may come to lie on another device, as ``device_map`` allows.
    """

    name: str
    tracer: Tracer
    bytes: int
    group: str
    adapter: bool = False
    movable: bool = False

    @property
    def skeleton(self) -> Skeleton:
        """Its model."""
        return self.tracer.skeleton


@dataclass(frozen=True)
class StageModels:
    """Student and speakers of a stage."""

    student: Tracer
    speakers: tuple[Speaker, ...]

    @property
    def groups(self) -> list[list[Speaker]]:
        """The speakers that are heard together."""
        names = dict.fromkeys(speaker.group for speaker in self.speakers)
        return [[speaker for speaker in self.speakers if speaker.group == name] for name in names]


class ModelPlanner:
    """Skeletons of a recipe's models, each made once."""

    def __init__(self) -> None:
        self._tracers: dict[str, Tracer] = {}

    def stage(self, recipe: Recipe, name: str, gpu: bool = True) -> StageModels:
        """The models of a stage of a recipe (or of a changed one: equal models are made once).

        Args:
            recipe: resolved.
            name: of the stage.
            gpu: whether the student is on one; on a CPU host memory is the student's memory.

        Raises:
            UserError: see ``daekit.planning.shapes`` and ``daekit.planning.skeleton``.
        """
        stage, shapes = recipe.stages[name], Shapes(recipe)
        spec, lora = student_of(recipe, name)
        student = self._tracer(shapes, spec, lora, trained=True)
        speakers = []
        for who, group, each in _speakers(stage):
            if each.adapter is not None:
                bytes_ = self._adapter_bytes(recipe, shapes, spec, each.adapter)
                speakers.append(Speaker(who, student, bytes_, group, adapter=True))
            else:
                speakers.append(self._loaded(shapes, each, who, group, gpu))
        if stage.type == "dae" and stage.reference is None:  # the student as it stands
            own = sum(p.bytes for p in student.skeleton.parameters() if p.adapter)
            copy = Speaker("reference", student, own, "reference", adapter=True)
            speakers.append(self._loaded(shapes, spec, "reference", "reference", gpu) if lora is None else copy)
        return StageModels(student, tuple(speakers))

    def _loaded(self, shapes: Shapes, spec: ModelSpec, who: str, group: str, gpu: bool) -> Speaker:
        tracer = self._tracer(shapes, spec, None, trained=False)
        layers = [sum(p.bytes for p in layer) for layer in tracer.skeleton.layers]
        ends = sum(p.bytes for p in tracer.skeleton.outside)
        if spec.offload and gpu:  # two layers at a time are on the student's device
            return Speaker(who, tracer, ends + 2 * max(layers), group)
        devices = spec.device_map.values() if isinstance(spec.device_map, dict) else [spec.device_map or "0"]
        if gpu and not any(device in _SAME_GPU or device in _MAPS for device in devices):
            return Speaker(who, tracer, 0, group)
        # transformers spreads it over what it finds; a mapping is counted as a whole
        movable = isinstance(spec.device_map, dict) or spec.device_map in _MAPS
        return Speaker(who, tracer, ends + sum(layers), group, movable=movable)

    def _adapter_bytes(self, recipe: Recipe, shapes: Shapes, base: ModelSpec, adapter: str) -> int:
        """Bytes of an adapter that speaks on the student's base; none of the base itself."""
        if adapter == BARE_BASE:
            return 0
        lora = lora_of(recipe, adapter)
        skeleton = self._tracer(shapes, base, lora, trained=True).skeleton
        return sum(p.bytes for p in skeleton.parameters() if p.adapter)

    def _tracer(self, shapes: Shapes, spec: ModelSpec, lora: LoraSpec | None, trained: bool) -> Tracer:
        shape = shapes.of(spec)
        fields = {name: value for name, value in vars(shape).items() if name != "config"}
        key = repr((shape.config.to_json_string(), fields, lora, trained))
        if key not in self._tracers:
            self._tracers[key] = Tracer(Skeleton(shape, lora, trained))
        return self._tracers[key]


def student_of(recipe: Recipe, name: str) -> tuple[ModelSpec, LoraSpec | None]:
    """(the base of a stage's student, the adapter that is trained on it); a continued adapter has its own stage's base."""
    spec, lora = recipe.stages[name].student, recipe.stages[name].lora
    assert spec is not None, "a resolved recipe names every student"
    if spec.adapter is None:
        return spec, lora
    origin = adapter_stage(spec.adapter)
    if origin is not None:
        return student_of(recipe, origin)
    return base_spec(spec), lora_of(recipe, spec.adapter)


def lora_of(recipe: Recipe, adapter: str) -> LoraSpec | None:
    """The adapter that an earlier stage trains, or that lies in a directory."""
    origin = adapter_stage(adapter)
    if origin is not None:
        return student_of(recipe, origin)[1]
    config = lora_config_of(adapter)
    targets = config.target_modules or ()
    return LoraSpec(
        r=config.r,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=config.use_dora,
    )


def _speakers(stage: StageSpec) -> Iterator[tuple[str, str, ModelSpec]]:
    """(name, group, model) of every model that is loaded to speak; equal teachers are loaded once."""
    seen: set[str] = set()
    for key, spec in stage.teachers_by_key().items():
        if repr(spec) in seen:
            continue
        seen.add(repr(spec))
        label = f"teacher {key[-1]}" if key[0] == "teachers" else str(key[0])
        if spec.model is not None:
            yield label, label, spec.model
        for index, member in enumerate(spec.ensemble):
            yield f"{label} {index + 1}", label, member.model
