"""The typed form of a recipe: what a YAML file may say, with types, bounds, defaults and documentation.

One file is one run of one or more stages. Every mapping of the YAML is one pydantic model; an unknown key is an error.
Names are those of TRL, PEFT and transformers wherever the same thing has one. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from daekit.errors import UserError
from daekit.recipe.adapter_config import adapter_stage, read_adapter_config
from daekit.recipe.model import CalibrationSpec, Dtype, ModelSpec, StudentSearchSpec, StudentSpec
from daekit.recipe.reading import ByType, FilePath, Flag, Seed, Spec, Text, Whole, content
from daekit.recipe.rows import MixtureSpec, SourceSpec, TokenizerSpec, TokenizerTraining
from daekit.recipe.stages import STAGES, DAEStage, KDStage, LoraSpec, SFTStage, StageSpec
from daekit.recipe.suite import SuiteSpec
from daekit.recipe.teacher import CacheSpec, TeacherSpec, WeightedModelSpec
from daekit.recipe.tree import KeyPath

__all__ = [
    "STUDENT_AS_IT_WAS",
    "CacheSpec",
    "CalibrationSpec",
    "DAEStage",
    "Dtype",
    "EvaluatedModel",
    "EvaluationSpec",
    "KDStage",
    "LoraSpec",
    "MixtureSpec",
    "ModelSpec",
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


class EvaluatedModel(ModelSpec):
    """A model that the report measures: a stage, ``student-as-it-was``, or any other by ``{name: NAME, path: PATH}``.

    A plain text names a stage, or the first stage's student before any training; ``{NAME: PATH}`` is short for the two keys.
    """

    NOUN: ClassVar = "the name of a stage, or {name: NAME, path: PATH}"

    name: Text = Field(description="Its name in the report.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class; a stage is the model ``{stage: NAME}``."""
        if isinstance(value, str):
            return {"name": value} if value == STUDENT_AS_IT_WAS else {"name": value, "stage": value}
        if not isinstance(value, dict):
            return value
        if len(value) == 1 and not value.keys() & cls.model_fields.keys():
            ((name, model),) = value.items()
            model = ModelSpec.expand(content(model))
            return {"name": name} | (model if isinstance(model, dict) else {"path": model})
        return ModelSpec.expand({key: below for key, below in value.items() if key != "name"}) | {
            key: below for key, below in value.items() if key == "name"
        }

    @property
    def is_stage(self) -> bool:
        """Whether it is the result of a stage, named as that is."""
        return self.stage == self.name and self.checkpoint is None

    def compact(self, dumped: dict[str, Any]) -> Any:
        """A stage's result and the student as it was are written as their names."""
        only = self.changed(*type(self).model_fields)
        if self.name == STUDENT_AS_IT_WAS or (self.is_stage and {*only} == {"name", "stage"}):
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
    output_dir: FilePath = Field(min_length=1, description="Everything the run writes is below it.")
    models: dict[str, ModelSpec] = Field(
        {}, description="Name -> model; `model:NAME` stands for it where a model or path is named."
    )
    sources: dict[str, SourceSpec] = Field(min_length=1, description="Name -> rows of one domain.")
    stages: dict[str, Annotated[StageSpec, ByType(STAGES)]] = Field(
        min_length=1, description="Name -> stage, in the order in which they run."
    )
    seed: Seed = Field(0, description="Of data order, initial weights and dropout of every stage.")
    tokenizer: TokenizerSpec | None = Field(None, description="Default: that of the first student.")
    evaluation: EvaluationSpec | None = Field(None, description="The report; without it there is none.")

    def earlier_stages(self, name: str) -> list[str]:
        """The stages that run before ``name``."""
        names = list(self.stages)
        return names[: names.index(name)]

    def seed_of(self, name: str) -> int:
        """The seed of a stage: its own, or that of the recipe."""
        seed = self.stages[name].seed
        return self.seed if seed is None else seed

    def measured_teachers(self, name: str) -> dict[KeyPath, TeacherSpec]:
        """The teachers of a stage that the report of a resolved recipe loads, cached or not, by their keys.

        KL to them is measured on validation rows, and a cache holds rows of the training.
        """
        report, stage = self.evaluation, self.stages[name]
        if report is None or not report.sources:
            return {}
        domains = {self.sources[source].domain for source in report.sources}
        is_measured = any(model.is_stage and model.name == name for model in report.models)
        alone = [each.type for each in self.stages.values()].count("dae") == 1  # its reference is that of all models
        asked = {("teacher",), *(("teachers", domain) for domain in domains), ("reference",)} if is_measured else set()
        asked |= {("reference",)} if alone else set()
        return {key: each for key, each in stage.teachers_by_key().items() if key in asked and each.has_models}

    def base_of(self, name: str) -> ModelSpec | None:
        """The model whose weights a LoRA stage leaves as they are; None where the recipe cannot say."""
        stage = self.stages[name]
        if stage is None:
            return None
        student = stage.student or ModelSpec()
        if student.path or student.stage or student.config:
            return student.model_copy(update={"adapter": None})
        origin, earlier = adapter_stage(student.adapter), self.earlier_stages(name)
        if origin is not None:
            return self.base_of(origin) if origin in earlier else None
        if student.adapter is not None:
            try:
                config = read_adapter_config(student.adapter)
            except UserError:  # noted where the student is checked
                return None
            base = {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
            return student.model_copy(update={"adapter": None, **base})
        return student.model_copy(update={"stage": earlier[-1]}) if earlier and student.init is None else None
