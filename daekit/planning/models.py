"""The models of one stage: its student, and everybody who speaks to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from daekit.planning.shapes import Shapes
from daekit.planning.skeleton import Skeleton
from daekit.planning.trace import Tracer
from daekit.recipe.schema import LoraSpec, ModelSpec, Recipe, StageSpec, TeacherSpec


@dataclass(frozen=True)
class Speaker:
    """A frozen model of a stage.

    Attributes:
        name: what the plan calls it.
        tracer: of its model; of the student's where it is an adapter on it.
        bytes: of its weights; of its adapter alone where it is one.
        group: speakers of one group speak for the same rows (an ensemble), those of others for other rows.
        adapter: whether it is an adapter on the student's base.
    """

    name: str
    tracer: Tracer
    bytes: int
    group: str
    adapter: bool = False

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

    def stage(self, recipe: Recipe, name: str) -> StageModels:
        """The models of a stage of a recipe (or of a changed one: equal models are made once).

        Raises:
            UserError: see ``daekit.planning.shapes`` and ``daekit.planning.skeleton``.
        """
        stage, shapes = recipe.stages[name], Shapes(recipe)
        assert stage.student is not None, "a resolved recipe names every student"
        student = self._tracer(shapes, stage.student, stage.lora, trained=True)
        speakers = [self._speaker(shapes, each, student, who, group) for who, group, each in _speakers(stage)]
        if stage.type == "dae" and stage.reference is None:
            speakers.append(self._frozen_student(shapes, stage, student))
        return StageModels(student, tuple(speakers))

    def _speaker(self, shapes: Shapes, spec: ModelSpec, student: Tracer, who: str, group: str) -> Speaker:
        tracer = self._tracer(shapes, spec, None, trained=False)
        return Speaker(who, tracer, sum(p.bytes for p in tracer.skeleton.parameters()), group)

    def _frozen_student(self, shapes: Shapes, stage: StageSpec, student: Tracer) -> Speaker:
        if stage.lora is not None:
            adapter = sum(p.bytes for p in student.skeleton.parameters() if p.adapter)
            return Speaker("reference", student, adapter, "reference", adapter=True)
        assert stage.student is not None
        tracer = self._tracer(shapes, stage.student, None, trained=False)
        return Speaker("reference", tracer, sum(p.bytes for p in tracer.skeleton.parameters()), "reference")

    def _tracer(self, shapes: Shapes, spec: ModelSpec, lora: LoraSpec | None, trained: bool) -> Tracer:
        shape = shapes.of(spec)
        facts = (shape.config.to_json_string(), shape.config._attn_implementation, replace(shape, config=None))  # type: ignore[arg-type]
        key = repr((facts, lora, trained))
        if key not in self._tracers:
            self._tracers[key] = Tracer(Skeleton(shape, lora, trained))
        return self._tracers[key]


def _speakers(stage: StageSpec) -> Iterator[tuple[str, str, ModelSpec]]:
    """(name, group, model) of every model that is loaded to speak; equal teachers are loaded once."""
    named: dict[str, TeacherSpec] = dict(stage.teachers)
    if stage.teacher is not None:
        named["teacher"] = stage.teacher
    if stage.reference is not None:
        named["reference"] = stage.reference
    seen: set[str] = set()
    for name, spec in named.items():
        if repr(spec) in seen:
            continue
        seen.add(repr(spec))
        label = name if name in ("teacher", "reference") else f"teacher {name}"
        if spec.model is not None:
            yield label, name, spec.model
        for index, member in enumerate(spec.ensemble):
            yield f"{label} {index + 1}", name, member.model
