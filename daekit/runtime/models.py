"""Models and teachers of a recipe: specs in, live objects out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.adapters import base_spec, load_continued, require_adapters_fit
from daekit.models.backbone import base_of
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.protocol import Teacher
from daekit.recipe import student_key
from daekit.recipe.adapter_config import BARE_BASE, adapter_stage
from daekit.recipe.schema import ModelSpec, Recipe, StageSpec, TeacherSpec
from daekit.runtime.folders import RunFolder
from daekit.teachers import BASE, AdapterPath, EnsembleTeacher, LabelTeacher, ModelTeacher, RoutedTeacher
from daekit.teachers.on_student import adapter_paths, on_student


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
        """The spec with earlier stages replaced by the directories of their results and adapters."""
        if spec.stage is not None:
            path = self.folder.stage(spec.stage).model
            if spec.checkpoint is not None:
                path = self.folder.stage(spec.stage).root / f"checkpoint-{spec.checkpoint}"
                if not path.is_dir():
                    reference = f"stage:{spec.stage}@checkpoint-{spec.checkpoint}"
                    raise UserError(f"{reference}: there is no {path}; name a checkpoint that was kept")
            spec = spec.model_copy(update={"stage": None, "checkpoint": None, "path": str(path.resolve())})
        origin = adapter_stage(spec.adapter)
        if origin is None:
            return spec
        stage = self.folder.stage(origin)  # a stage whose result is merged keeps its adapter beside it
        return spec.model_copy(update={"adapter": str((stage.adapter if stage.adapter.is_dir() else stage.model).resolve())})

    def model(self, spec: ModelSpec, seed: int = 0) -> PreTrainedModel | PeftModel:
        """Load or make a model, or a base with the adapter that its stage continues.

        Its tokenizer is compared with the run's before its weights are loaded.

        Args:
            spec: what to load or make.
            seed: of the random weights of a model made from a config.

        Raises:
            UserError: see ``daekit.models.loading``; another tokenizer.
        """
        placed = self.placed(spec)
        base = base_spec(placed)
        if base.path is not None:
            require_same(self.tokenizer, load_tokenizer_of(base), base.path)
        return load_model(placed, self.tokenizer, seed) if placed.adapter is None else load_continued(placed)

    def teacher(self, spec: TeacherSpec) -> Teacher | AdapterPath:
        """A teacher or an ensemble of teachers, frozen; labels. Whether it is cached does not matter here."""
        if spec.labels:
            return LabelTeacher()
        if spec.model is not None:
            return self._single(spec.model)
        members = [self._single(member.model) for member in spec.ensemble]
        return EnsembleTeacher(members, [member.weight for member in spec.ensemble], spec.average)

    def teachers(self, specs: Mapping[str, TeacherSpec]) -> dict[str, Teacher | AdapterPath]:
        """Domain -> teacher; one object for equal specs, so that a teacher of two domains is loaded once and runs once."""
        loaded = {text: self.teacher(spec) for text, spec in {repr(spec): spec for spec in specs.values()}.items()}
        return {domain: loaded[repr(spec)] for domain, spec in specs.items()}

    def require_adapters_fit(self, stage: StageSpec) -> None:
        """Compare the adapters that the teachers of a stage are with its student's base, before any weight is loaded.

        Raises:
            UserError: an adapter of another base, incomplete, with another tokenizer, or of a kind that is not supported.
        """
        assert stage.student is not None, "a resolved recipe names every student"
        teachers = stage.teachers_by_key().values()
        specs = [teacher.model for teacher in teachers] + [each.model for teacher in teachers for each in teacher.ensemble]
        named = {spec.adapter: self.placed(spec).adapter for spec in specs if spec and spec.adapter not in (None, BARE_BASE)}
        folders = [folder for folder in named.values() if folder is not None]
        for folder in folders:
            if (Path(folder) / "tokenizer_config.json").is_file():
                require_same(self.tokenizer, load_tokenizer_of(ModelSpec(path=folder)), folder)
        if folders:
            require_adapters_fit(folders, base_spec(self.placed(stage.student)))

    def on_base(self, teachers: Mapping[str, Teacher | AdapterPath], student: ModelSpec, device: Any) -> dict[str, Any]:
        """Teachers by domain, outside of a training: adapters speak on the student's base, loaded once for all of them."""
        routed = RoutedTeacher(teachers)
        paths = adapter_paths(routed)
        if not paths:
            return dict(teachers)
        placed = self.placed(student)
        folder = next((each.path for each in paths if each.path is not None), placed.adapter)
        if folder is not None:
            model = load_continued(base_spec(placed).model_copy(update={"adapter": folder}))
        else:  # any adapter will do, for it stays off
            model = get_peft_model(load_model(base_spec(placed)), LoraConfig("CAUSAL_LM", r=1, target_modules="all-linear"))
        if not getattr(base_of(model), "is_quantized", False):  # a quantised one has been placed when it was loaded
            model.to(device)
        speaking = on_student(routed, model, vocabulary_size(self.tokenizer))
        assert isinstance(speaking, RoutedTeacher)
        return speaking.routes

    def _single(self, spec: ModelSpec) -> Teacher | AdapterPath:
        if spec.adapter is not None:
            return BASE if spec.adapter == BARE_BASE else AdapterPath(self.placed(spec).adapter)
        name = spec.stage or spec.path or "teacher"
        return ModelTeacher(self.model(spec), vocabulary_size(self.tokenizer), name, offload=spec.offload)
