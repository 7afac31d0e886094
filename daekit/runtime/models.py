"""Models and teachers of a recipe: specs in, live objects out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from daekit.errors import UserError
from daekit.generation import Permissions
from daekit.models.adapters import base_spec, config_of, holds_tokenizer, load_continued, require_adapters_fit
from daekit.models.backbone import base_of
from daekit.models.features import feature_spec, layers_of
from daekit.models.hardware import require_attention, require_gradient, require_readable, require_trainable, settings_of
from daekit.models.loading import load_model, load_tokenizer_of, require_shards
from daekit.models.quantization import rank_device
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.models.zero3_loading import in_own_dtype, without_zero3
from daekit.protocol import Teacher
from daekit.recipe import student_key
from daekit.recipe.adapter_config import BARE_BASE, adapter_stage
from daekit.recipe.schema import DAEStage, ModelSpec, StageSpec, TeacherSpec
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import StudentFolder
from daekit.students.importance import config_of_shape
from daekit.students.shapes import Shape
from daekit.teachers import BASE, AdapterPath, EnsembleTeacher, LabelTeacher, ModelTeacher, RoutedTeacher, ServerTeacher
from daekit.teachers.parts import leaves, on_student


class ModelBuilder:
    """Builds the models of one run, all for the tokenizer of its rows."""

    def __init__(self, data: DataBuilder, allowed: Permissions = Permissions()) -> None:
        self.data, self.recipe, self.folder, self.tokenizer = data, data.recipe, data.folder, data.tokenizer
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.allowed = allowed  # which keys may be sent where
        self.ahead: frozenset[str] = frozenset()  # while a run is prepared: the stages that it will train
        self._looked_at: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where models of this process run outside of a training."""
        return PartialState().device

    def student_spec(self, name: str) -> ModelSpec:
        """The student of a stage, as the recipe says it."""
        spec = self.recipe.stages[name].student
        assert spec is not None, "a resolved recipe names every student"
        return spec

    def student_folder(self, name: str) -> StudentFolder:
        """Where the student of a stage lies that is made from its teacher."""
        return self.folder.student(student_key(self.recipe, name))

    def start_of(self, name: str) -> ModelSpec:
        """What a stage begins with; a student that is made from its teacher lies in the run's folder when it is used."""
        spec = self.student_spec(name)
        return spec if spec.init is None else ModelSpec(path=str(self.student_folder(name).model.resolve()))

    def student(self, name: str, split: bool = False) -> PreTrainedModel:
        """The model that a stage begins with."""
        return self.model(self.start_of(name), self.recipe.seed_of(name), split)

    def look_at(self, spec: ModelSpec, student: StageSpec | None = None) -> None:
        """Whether a model can be loaded, as far as its config, tokenizer and the headers of its files say; once for each.

        ``student``: the stage whose student it is, or is made of.

        The result of a stage that is not complete is not there yet: it follows from the models of that stage.

        Raises:
            UserError: no model there, broken files, another tokenizer, a config that makes no model; an attention or a
                quantised checkpoint that this machine cannot run, or that cannot be trained.
        """
        key = repr((spec, student is None))
        if key in self._looked_at or not self.is_there(spec):
            return
        self._looked_at.add(key)
        if spec.config is not None:
            with torch.device("meta"):
                load_model(spec, self.tokenizer)
        base = base_spec(self.placed(spec))
        if base.path is None:
            return
        config = config_of(base)
        settings = settings_of(config)
        require_readable(settings, base.path)
        if student is not None:
            require_trainable(settings, base.path, student.is_lora and not (student.lora and student.lora.merge))
            require_gradient(spec.attn_implementation, rank_device(), base.path)
        if spec.attn_implementation is not None:
            require_attention(config, spec.attn_implementation, base.path, base.trust_remote_code)
        require_files(base.path)
        require_same(self.tokenizer, load_tokenizer_of(base), base.path)

    def config(self, spec: ModelSpec) -> PreTrainedConfig | None:
        """The config of a model, also of a result that is not there yet; None of a student made of experts, or searched.

        Of a student that is to be cut from its teacher: which of the layers it keeps is not known yet.
        """
        origin = spec.stage or adapter_stage(spec.adapter)
        if origin is not None and not self.is_there(spec):
            return self.config(self.student_spec(origin))
        if spec.init is not None:
            teacher = self.config(spec.init.from_)
            if teacher is None or not spec.init.shape or spec.init.dense is not None:
                return None
            return config_of_shape(teacher, replace(Shape.of(teacher), **spec.init.shape))
        return AutoConfig.for_model(**spec.config) if spec.config is not None else config_of(base_spec(self.placed(spec)))

    def is_there(self, spec: ModelSpec) -> bool:
        """Whether what a spec names exists before the run: not the result of a stage that is not complete."""
        origins = [origin for origin in (spec.stage, adapter_stage(spec.adapter)) if origin is not None]
        return spec.adapter != BARE_BASE and not self.ahead.intersection(origins) and not self.folder.first_missing(origins)

    def without_weights(self, name: str) -> PreTrainedModel | None:
        """The student of a stage on the meta device, in float32; None where that is not known yet."""
        spec = self.student_spec(name)
        if not self.is_there(spec):
            return self.without_weights(spec.stage) if spec.stage is not None else None
        if spec.config is not None:
            with torch.device("meta"):
                return load_model(spec, self.tokenizer)
        config, trusted = self.config(spec), base_spec(self.placed(spec)).trust_remote_code
        with torch.device("meta"):
            return None if config is None else AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)

    def placed(self, spec: ModelSpec) -> ModelSpec:
        """The spec with earlier stages replaced by the directories of their results and adapters."""
        if spec.stage is not None:
            stage = self.folder.stage(spec.stage)
            path = stage.model if spec.checkpoint is None else stage.checkpoint(spec.checkpoint)
            spec = spec.model_copy(update={"stage": None, "checkpoint": None, "path": str(path.resolve())})
        origin = adapter_stage(spec.adapter)
        if origin is None:
            return spec
        stage = self.folder.stage(origin)  # a stage whose result is merged keeps its adapter beside it
        return spec.model_copy(update={"adapter": str((stage.adapter if stage.adapter.is_dir() else stage.model).resolve())})

    def model(self, spec: ModelSpec, seed: int = 0, split: bool = False) -> PreTrainedModel | PeftModel:
        """Load or make a model, or a base with the adapter that its stage continues.

        Its tokenizer is compared with the run's before its weights are loaded.

        Args:
            spec: what to load or make.
            seed: seed of the random weights of a model made from a config.
            split: FSDP2 is about to split it, see ``load_model``.

        Raises:
            UserError: see ``daekit.models.loading``; another tokenizer.
        """
        placed = self.placed(spec)
        base = base_spec(placed)
        if base.path is not None:
            require_same(self.tokenizer, load_tokenizer_of(base), base.path)
        return load_model(placed, self.tokenizer, seed, split) if placed.adapter is None else load_continued(placed, split)

    def teacher(self, spec: TeacherSpec, split: bool = False) -> Teacher:
        """A teacher or an ensemble of teachers, frozen; labels. Whether it is cached does not matter here.

        ``split``: a trainer is about to split its models over the ranks, see ``load_model``.
        """
        if spec.kind == "labels":
            return LabelTeacher()
        if spec.kind == "server":
            return self.served(spec)
        models = [self._single(model, split) for model in spec.models().values()]
        if spec.kind == "model":
            return models[0]
        return EnsembleTeacher(models, [member.weight for member in spec.ensemble], spec.average)

    def served(self, spec: TeacherSpec) -> ServerTeacher:
        """A teacher on another machine; of a cache, it is asked for as many tokens as that keeps."""
        assert spec.server is not None
        options = dict(spec.server) | ({} if spec.cache is None else {"k": spec.cache.k})
        return ServerTeacher(vocab_size=self.vocab_size, allowed=self.allowed, **options)

    def teachers(self, specs: Mapping[str, TeacherSpec], split: bool = False) -> dict[str, Teacher]:
        """Domain -> teacher; one object for equal specs, so that a teacher of two domains is loaded once and runs once."""
        loaded = {text: self.teacher(spec, split) for text, spec in {repr(spec): spec for spec in specs.values()}.items()}
        return {domain: loaded[repr(spec)] for domain, spec in specs.items()}

    def require_adapters_fit(self, name: str) -> None:
        """Compare the adapters that the teachers of a stage are with its student's base, before any weight is loaded.

        Raises:
            UserError: an adapter of another base, incomplete, with another tokenizer, or of a kind that is not supported.
        """
        student, models = self.student_spec(name), self.recipe.stages[name].models()
        named = {
            spec.adapter: self.placed(spec).adapter
            for key, spec in models.items()
            if key != ("student",) and spec.adapter not in (None, BARE_BASE) and self.is_there(spec)
        }
        folders = [folder for folder in named.values() if folder is not None]
        for folder in folders:
            if holds_tokenizer(folder):
                require_same(self.tokenizer, load_tokenizer_of(ModelSpec(path=folder)), folder)
        if folders and self.is_there(student):
            require_adapters_fit(folders, base_spec(self.placed(student)))

    def require_comparable(self, name: str) -> None:
        """Compare the layers and heads of a stage's student with its teachers', as attention and hidden-state losses will.

        Raises:
            UserError: see ``layers_of``.
        """
        stage, student = self.recipe.stages[name], self.student_spec(name)
        made = student.init is not None and self.student_folder(name).facts.is_file()
        config = config_of(self.start_of(name)) if made else self.config(student)
        features = feature_spec(stage.loss, config) if config is not None and stage.type != "sft" else None
        if features is None:
            return
        # an adapter runs on the student's base
        models = [spec for teacher in stage.teachers_by_key().values() for spec in teacher.models().values()]
        compared = [self.config(spec) if spec.adapter is None else config for spec in models]
        if isinstance(stage, DAEStage) and (stage.reference is None or stage.reference.kind == "student"):
            compared.append(config)
        for theirs in compared:
            if theirs is not None:
                layers_of(features, theirs)

    def on_base(self, teachers: Mapping[str, Teacher], student: ModelSpec) -> dict[str, Any]:
        """Teachers by domain, outside of a training: adapters run on the student's base, loaded once for all of them."""
        routed = RoutedTeacher(teachers)
        paths = [each for each in leaves(routed) if isinstance(each, AdapterPath)]
        if not paths:
            return dict(teachers)
        placed = self.placed(student)
        folder = next((each.path for each in paths if each.path is not None), placed.adapter)
        if folder is not None:
            model = load_continued(base_spec(placed).model_copy(update={"adapter": folder}))
        else:  # any adapter will do, for it stays off
            model = get_peft_model(load_model(base_spec(placed)), LoraConfig("CAUSAL_LM", r=1, target_modules="all-linear"))
        if not getattr(base_of(model), "is_quantized", False):  # a quantised one has been placed when it was loaded
            model.to(self.device)
        completed = on_student(routed, model, self.vocab_size)
        assert isinstance(completed, RoutedTeacher)
        return completed.routes

    def _single(self, spec: ModelSpec, split: bool) -> Teacher:
        if spec.adapter is not None:
            return BASE if spec.adapter == BARE_BASE else AdapterPath(self.placed(spec).adapter)
        name = spec.stage or spec.path or "teacher"
        placed = spec.whole or spec.offload or spec.device_map is not None
        with without_zero3() if placed else in_own_dtype():
            model = self.model(spec, split=split and not spec.whole)
        return ModelTeacher(model, self.vocab_size, name, offload=spec.offload, whole=spec.whole)


def require_files(path: str) -> None:
    """Whether a local directory holds whole safetensors files, by their headers.

    Raises:
        UserError: no weights, a shard that is missing, a file that is cut off.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return  # of the hub
    require_shards(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: holds no weights (*.safetensors; pickled ones are not read)")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: is not a whole safetensors file ({error}); copy it again") from error
