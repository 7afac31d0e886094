"""The typed form of a recipe: what a YAML file may say, with types, bounds, defaults and documentation.

One file is one run of one or more stages. Every mapping of the YAML is one pydantic model; an unknown key is an error.
Names are those of TRL, PEFT and transformers wherever the same thing has one. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo

from daekit.recipe.model import (
    CacheSpec,
    CalibrationSpec,
    Dtype,
    ModelSpec,
    Quantization,
    StudentSearchSpec,
    StudentSpec,
    TeacherSpec,
    WeightedModelSpec,
)
from daekit.recipe.objective import Objective
from daekit.recipe.reading import (
    Choice,
    Flag,
    Leaf,
    Number,
    Spec,
    Text,
    Whole,
    Written,
    as_text,
    by_type,
)
from daekit.recipe.rows import BUILTIN_CORPORA, MixtureSpec, SourceSpec, TokenizerSpec, TokenizerTraining
from daekit.recipe.suite import Column, SuiteSpec
from daekit.recipe.trainer_options import read_trainer_options
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors

__all__ = [
    "BUILTIN_CORPORA",
    "STUDENT_AS_IT_WAS",
    "CacheSpec",
    "CalibrationSpec",
    "Column",
    "DAEStage",
    "Dtype",
    "EvaluatedModel",
    "EvaluationSpec",
    "KDStage",
    "LoraSpec",
    "MixtureSpec",
    "ModelSpec",
    "Quantization",
    "Recipe",
    "SFTStage",
    "SourceSpec",
    "StageSpec",
    "StudentSearchSpec",
    "StudentSpec",
    "TeacherSpec",
    "TokenizerSpec",
    "TokenizerTraining",
    "WeightedModelSpec",
]

STUDENT_AS_IT_WAS = "student-as-it-was"  # among the models of an evaluation: the first stage's student before any training
LARGEST_SEED = 2**32 - 1  # of numpy


class LoraSpec(Spec):
    """A LoRA adapter for the student (PEFT's names). With ``student.quantization: 4bit`` this is QLoRA."""

    r: Whole = Field(16, gt=0, le=65536, description="Rank.")
    lora_alpha: Whole = Field(32, gt=0, description="The adapter's output is multiplied by lora_alpha / r.")
    lora_dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: Text | tuple[Text, ...] = Field("all-linear", description="Names of modules, or `all-linear`.")
    use_rslora: Flag = Field(False, description="Multiply by lora_alpha / sqrt(r) instead.")
    use_dora: Flag = Field(False, description="Learn magnitudes apart from directions (DoRA).")
    merge: Flag = Field(
        False,
        description="Fold the adapter into the (unquantised) base when the stage ends, so that its result is a plain model.",
    )


_FOREIGN_TO_KD = {
    "teachers": "a kd stage follows one `teacher` on all rows; for a teacher per domain use type: dae",
    "reference": "a kd stage has no reference; for one use type: dae",
    "reference_domains": "a kd stage has no reference; for one use type: dae",
}
_FOREIGN_TO_SFT = {
    "teacher": "an sft stage learns from the data alone; for a teacher use type: kd",
    "teachers": "an sft stage learns from the data alone; for teachers use type: dae",
    "reference": "an sft stage learns from the data alone; for a reference use type: dae",
    "reference_domains": "an sft stage has no reference; for one use type: dae",
    "loss": "an sft stage has the cross-entropy as its only loss; for others use type: kd or dae",
}
_FIRST = ("type", "student", "lora", "teacher", "teachers", "reference", "reference_domains", "data")


def _read_options(value: Any, info: ValidationInfo) -> Any:
    return read_trainer_options(value, info.context if isinstance(info.context, Errors) else None)


class _Stage(Spec):
    """What every training run has."""

    TYPES: ClassVar = ("sft", "kd", "dae")

    data: MixtureSpec = Field(description="The rows.")
    student: ModelSpec | None = Field(
        None, description="The model to train; without path, stage and config: the result of the stage before."
    )
    lora: LoraSpec | None = Field(None, description="Train an adapter on the student.")
    seed: Whole | None = Field(
        None,
        ge=0,
        le=LARGEST_SEED,
        description="Of this stage alone (two teachers from scratch that shall differ); default: the seed of the recipe.",
    )
    overlong: Annotated[Literal["error", "truncate", "drop"], Choice] = Field(
        "error", description="What becomes of rows longer than trainer.max_length."
    )
    trainer: Annotated[dict[str, Any], BeforeValidator(_read_options)] = Field(
        {}, description="Any field of trl.SFTConfig (learning_rate, max_steps, per_device_train_batch_size, packing...)."
    )

    def teachers_by_key(self) -> dict[Path, TeacherSpec]:
        """Key path below the stage -> every teacher that it names, the reference last."""
        return {}

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """The models first, as people write it."""
        return {key: dumped[key] for key in _FIRST if key in dumped} | dumped


class SFTStage(_Stage):
    """Cross-entropy on the data's own tokens."""

    FOREIGN: ClassVar = _FOREIGN_TO_SFT
    type: Annotated[Literal["sft"], Choice]

    @property
    def loss(self) -> Objective:
        """The cross-entropy alone."""
        return Objective(ce_weight=1.0, prediction_weight=0.0)


class KDStage(_Stage):
    """Follow one teacher on all rows."""

    FOREIGN: ClassVar = _FOREIGN_TO_KD
    type: Annotated[Literal["kd"], Choice]
    teacher: TeacherSpec = Field(description="The teacher to follow.")
    loss: Objective = Field(Objective(), description="The objective.")

    def teachers_by_key(self) -> dict[Path, TeacherSpec]:
        """See the base class."""
        return {("teacher",): self.teacher} if self.teacher is not None else {}


class DAEStage(_Stage):
    """Follow the teacher of each row's domain, and the reference elsewhere."""

    FOREIGN: ClassVar = {"teacher": "a dae stage names a teacher per domain: `teachers: {DOMAIN: MODEL}`"}
    type: Annotated[Literal["dae"], Choice]
    teachers: dict[str, TeacherSpec] = Field(description="Domain -> teacher.")
    reference: TeacherSpec | None = Field(
        None, description="The model to follow on reference_domains; default: the student as it stands, frozen."
    )
    reference_domains: tuple[Text, ...] = Field(("general",), description="Domains that follow the reference.")
    loss: Objective = Field(Objective(), description="The objective.")

    def teachers_by_key(self) -> dict[Path, TeacherSpec]:
        """See the base class."""
        found: dict[Path, TeacherSpec] = {("teachers", domain): each for domain, each in (self.teachers or {}).items()}
        if self.reference is not None:
            found["reference",] = self.reference
        return {key: each for key, each in found.items() if each is not None}


StageSpec: TypeAlias = SFTStage | KDStage | DAEStage
_AnyStage = Annotated[
    Annotated[SFTStage, Tag("sft")] | Annotated[KDStage, Tag("kd")] | Annotated[DAEStage, Tag("dae")],
    Discriminator(by_type({"sft": SFTStage, "kd": KDStage, "dae": DAEStage})),
]


class EvaluatedModel(ModelSpec):
    """A model that the report measures: a stage, ``student-as-it-was``, or any other by ``{name: NAME, path: PATH}``.

    A plain text names a stage, or the first stage's student before any training; ``{NAME: PATH}`` is short for the two keys.
    """

    NOUN: ClassVar = "the name of a stage, or {name: NAME, path: PATH}"

    name: Text = Field(description="Its name in the report.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class; a stage is the model ``{stage: NAME}``."""
        if isinstance(value, Mapping):
            if len(value) != 1 or next(iter(value)) in cls.model_fields:
                return value if "from" not in value else cls._made(value)
            (name, below), path = next(iter(value.items())), getattr(value, "path", None)
            values = (
                {"name": name, **model}
                if isinstance(model := ModelSpec.expand(below), Mapping)
                else {"name": name, "path": below}
            )
            return values if path is None else Written(values, (*path, name))
        text = as_text(value)
        if not isinstance(text, str):
            return value
        values = {"name": text} if text == STUDENT_AS_IT_WAS else {"name": text, "stage": text}
        return Written(values, value.path) if isinstance(value, Leaf) else values

    @property
    def is_stage(self) -> bool:
        """Whether it is the result of a stage, named as that is."""
        return self.stage == self.name and self.checkpoint is None

    @classmethod
    def _made(cls, value: Mapping[str, Any]) -> Any:
        rest = {key: below for key, below in value.items() if key != "name"}
        model = ModelSpec.expand(Written(rest, value.path) if isinstance(value, Written) else rest)
        values = {**model, **({"name": value["name"]} if "name" in value else {})}
        return Written(values, value.path) if isinstance(value, Written) else values

    def compact(self, dumped: dict[str, Any]) -> Any:
        """A stage's result and the student as it was are written as their names."""
        only = {key for key in type(self).model_fields if self.changed(key)}
        if self.name == STUDENT_AS_IT_WAS or (self.is_stage and only == {"name", "stage"}):
            return self.name
        return {"name": self.name, **super().compact(dumped)}


class EvaluationSpec(Spec):
    """The report that ends a run: every model x every domain with validation rows."""

    models: tuple[EvaluatedModel, ...] = Field(
        (),
        description="Names of stages, `student-as-it-was` (the first student before training), or {name: NAME, path: PATH}. "
        "Default: every stage, after `student-as-it-was` where the first student is loaded from a path.",
    )
    baseline: Text | None = Field(None, description="The evaluated model that gain and forgetting are measured against.")
    sources: tuple[Text, ...] = Field((), description="Sources whose validation rows are used (default: all that have some).")
    limit: Whole | None = Field(None, gt=0, description="At most so many validation rows per source.")
    generate: Flag = Field(True, description="Also generate answers greedily, for exact_match and answer_match.")
    max_new_tokens: Whole = Field(64, gt=0, description="Tokens to generate at most.")
    batch_size: Whole = Field(32, gt=0, description="Rows per forward pass.")
    bootstrap: Whole = Field(1000, gt=0, description="Resamples of the interval.")
    suites: tuple[SuiteSpec, ...] = Field(
        (),
        description="Suites to measure `models` with when the report is written: files, read when the recipe is loaded, or "
        "their content. Each writes into OUTPUT_DIR/suites/NAME. A suite without baseline takes this one.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the evaluated models."""
        return tuple(model.name for model in self.models if model is not None and model.name is not None)


class Recipe(Spec):
    """A whole run.

    Names of sources, stages and domains consist of letters, digits, ``_`` and ``-``: they become keys of overrides
    (``stages.NAME.lora.r=8``), folders and suffixes of metrics.
    """

    name: Text = Field(min_length=1, description="Becomes part of model cards and reports.")
    output_dir: Text = Field(min_length=1, description="Everything the run writes is below it.")
    sources: dict[str, SourceSpec] = Field(description="Name -> rows of one domain.")
    stages: dict[str, _AnyStage] = Field(description="Name -> stage, in the order in which they run.")
    seed: Whole = Field(0, ge=0, le=LARGEST_SEED, description="Of data order, initial weights and dropout of every stage.")
    tokenizer: TokenizerSpec | None = Field(None, description="Default: that of the first student.")
    evaluation: EvaluationSpec | None = Field(None, description="The report; without it there is none.")
