"""Models and teachers of a recipe: specs in, live objects out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.build.folders import RunFolder
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.protocol import Teacher
from daekit.recipe import student_key
from daekit.recipe.schema import ModelSpec, Recipe, TeacherSpec
from daekit.teachers import EnsembleTeacher, ModelTeacher


class ModelBuilder:
    """Builds the models of one run, all for the same tokenizer."""

    def __init__(self, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def student(self, recipe: Recipe, name: str, seed: int) -> PreTrainedModel:
        """The model that a stage begins with; one that is made from its teacher lies in the run's folder by now."""
        spec = recipe.stages[name].student
        assert spec is not None, "a resolved recipe names every student"
        if spec.init is not None:
            spec = ModelSpec(path=str(self.folder.student(student_key(recipe, name)).model.resolve()))
        return self.model(spec, seed)

    def placed(self, spec: ModelSpec) -> ModelSpec:
        """The spec with an earlier stage replaced by the directory of its result."""
        if spec.stage is None:
            return spec
        return replace(spec, stage=None, path=str(self.folder.stage(spec.stage).model.resolve()))

    def model(self, spec: ModelSpec, seed: int = 0) -> PreTrainedModel:
        """Load or make a model; its tokenizer is compared with the run's before its weights are loaded.

        Args:
            spec: what to load or make.
            seed: of the random weights of a model made from a config.

        Raises:
            UserError: see ``daekit.models.loading``; another tokenizer.
        """
        placed = self.placed(spec)
        if placed.path is not None:
            require_same(self.tokenizer, load_tokenizer_of(placed), placed.path)
        return load_model(placed, self.tokenizer, seed)

    def teacher(self, spec: TeacherSpec) -> Teacher:
        """A teacher or an ensemble of teachers, frozen."""
        if spec.model is not None:
            return self._single(spec.model)
        members = [self._single(member.model) for member in spec.ensemble]
        return EnsembleTeacher(members, [member.weight for member in spec.ensemble], spec.average)

    def teachers(self, specs: Mapping[str, TeacherSpec]) -> dict[str, Teacher]:
        """Domain -> teacher; one object for equal specs, so that a teacher of two domains is loaded once and runs once."""
        loaded = {text: self.teacher(spec) for text, spec in {repr(spec): spec for spec in specs.values()}.items()}
        return {domain: loaded[repr(spec)] for domain, spec in specs.items()}

    def _single(self, spec: ModelSpec) -> ModelTeacher:
        name = spec.stage or spec.path or "teacher"
        return ModelTeacher(self.model(spec), vocabulary_size(self.tokenizer), name)
