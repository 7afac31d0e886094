"""The stages of a run: ``sft``, ``kd`` and ``dae``; what a type does not have cannot be set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo

from daekit.errors import listed
from daekit.recipe.adapter_config import BARE_BASE, same_base
from daekit.recipe.model import ModelSpec
from daekit.recipe.objective import Objective, Selection
from daekit.recipe.reading import Choice, Flag, Number, Seed, Spec, Text, Whole
from daekit.recipe.rows import MixtureSpec
from daekit.recipe.teacher import TeacherSpec
from daekit.recipe.trainer_options import read_trainer_options
from daekit.recipe.tree import KeyPath
from daekit.recipe.validation import Errors, Problems, dotted


class LoraSpec(Spec):
    """A LoRA adapter for the student (PEFT's names). With ``student.quantization: 4bit`` this is QLoRA."""

    r: Whole = Field(16, gt=0, le=65536, description="Rank.")
    lora_alpha: Whole = Field(32, gt=0, description="The adapter's output is multiplied by lora_alpha / r.")
    lora_dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: Text | tuple[Text, ...] = Field("all-linear", description="Names of modules, or `all-linear`.")
    use_rslora: Flag = Field(False, description="Multiply by lora_alpha / sqrt(r) instead.")
    use_dora: Flag = Field(False, description="Learn magnitudes apart from directions (DoRA).")
    merge: Flag = Field(False, description="When the stage ends, fold the adapter into its (unquantised) base: a plain model.")


_NOT_IN_KD = {
    "teachers": "a kd stage follows one `teacher` on all rows; for a teacher per domain use type: dae",
    "reference": "a kd stage has no reference; for one use type: dae",
    "reference_domains": "a kd stage has no reference; for one use type: dae",
}
_NOT_IN_SFT = {
    "teacher": "an sft stage learns from the data alone; for a teacher use type: kd",
    "teachers": "an sft stage learns from the data alone; for teachers use type: dae",
    "reference": "an sft stage learns from the data alone; for a reference use type: dae",
    "reference_domains": "an sft stage has no reference; for one use type: dae",
    "loss": "an sft stage has the cross-entropy as its only loss; for others use type: kd or dae",
    "teacher_max_length": "an sft stage has no teacher; remove it",
    "select": "an sft stage has no teacher to measure forgetting by; use type: kd or dae",
}
_FIRST = ("type", "student", "lora", "teacher", "teachers", "reference", "reference_domains", "data")


def _read_options(value: Any, info: ValidationInfo) -> Any:
    return read_trainer_options(value, info.context if isinstance(info.context, Errors) else None)


class _Stage(Spec):
    """What every training run has."""

    data: MixtureSpec = Field(description="The rows.")
    student: ModelSpec | None = Field(None, description="The model to train; default: the result of the stage before.")
    lora: LoraSpec | None = Field(None, description="Train an adapter on the student.")
    seed: Seed | None = Field(
        None,
        description="Of this stage alone (two teachers from scratch that shall differ); default: the seed of the recipe.",
    )
    overlong: Annotated[Literal["error", "truncate", "drop"], Choice] = Field(
        "error", description="What becomes of rows longer than trainer.max_length."
    )
    trainer: Annotated[dict[str, Any], BeforeValidator(_read_options)] = Field(
        {}, description="Any field of trl.SFTConfig (learning_rate, max_steps, per_device_train_batch_size, packing...)."
    )

    def teachers_by_key(self) -> dict[KeyPath, TeacherSpec]:
        """Key path below the stage -> every teacher that it names, the reference last."""
        return {}

    def domains_of(self, key: KeyPath, present: Iterable[str]) -> list[str]:
        """Of the domains that have rows those whose rows follow the teacher at a key."""
        return list(present)

    def models(self) -> dict[KeyPath, ModelSpec]:
        """Key path below the stage -> every model that it names."""
        models: dict[KeyPath, ModelSpec] = {("student",): self.student} if self.student is not None else {}
        if self.student is not None and self.student.init is not None:
            models |= {("student", *path): model for path, model in self.student.init.models().items()}
        for key, teacher in self.teachers_by_key().items():
            models |= {(*key, *path): model for path, model in teacher.models().items()}
        return models

    @property
    def is_lora(self) -> bool:
        """Whether it trains an adapter."""
        return self.lora is not None or (self.student is not None and self.student.adapter is not None)

    def problems(self) -> Problems:
        """What cannot be trained as it is written, whatever the other stages are."""
        for path, model in self.models().items():
            if model is not self.student:
                yield from self._of_another(path, model)
        student = self.student or ModelSpec()
        for key in student.changed("device_map", "offload", "whole"):
            yield ("student", key), "belongs to a teacher; a student is trained on the devices of `accelerate launch`"
        if student.quantization is not None and not self.is_lora:
            remedy = "add `lora` to train an adapter on it (QLoRA), or remove this"
            yield ("student", "quantization"), f"a student in {student.quantization} cannot be trained itself; {remedy}"
        if student.adapter is not None:
            yield from self._of_a_continued(student)
        elif self.lora is not None and student.config is not None and student.quantization is None:
            yield "lora", "a student made from a config has random weights, which an adapter cannot make up for; remove it"
        elif self.lora is not None and student.init is not None:
            later = "train the adapter in a later stage"
            yield "lora", f"a part of a teacher must be trained whole before an adapter makes up for what is missing; {later}"

    def _of_another(self, path: KeyPath, model: ModelSpec) -> Problems:
        """A model that is not the student: an adapter on the student's base, or one of its own."""
        if model.init is not None:
            yield path, "only the student of a stage is made `from` another model; make it in a stage of its own"
        if model.adapter is None or path[0] == "student":
            return
        more = [key for key in model.changed(*ModelSpec.model_fields) if key != "adapter"]
        if more:
            remedy = f"remove {listed(more)}, or, for a model of its own, remove `adapter`"
            yield (*path, more[0]), f"an adapter runs on the student's base, as it is loaded there; {remedy}"
        if not self.is_lora:
            remedy = "add `lora`, or name a model"
            yield (*path, "adapter"), f"is an adapter on the student's base, but the student is trained whole; {remedy}"

    def _of_a_continued(self, student: ModelSpec) -> Problems:
        """A student that goes on with an adapter."""
        if student.adapter == BARE_BASE:
            yield ("student", "adapter"), "a student cannot train the bare base's adapter; leave `adapter` out and give `lora`"
        if self.lora is not None:
            yield "lora", "the student goes on with an adapter that has its own rank; remove `lora`, or `student.adapter`"
        if student.config is not None:
            yield ("student", "config"), "an adapter belongs to the base it was trained on, not to random weights"
        if student.path is None and student.revision is not None:
            remedy = "give its `path`, or remove it: the adapter's own base is loaded then"
            yield ("student", "revision"), f"is a revision of which base? {remedy}"

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """The models first, as people write it."""
        return {key: dumped[key] for key in _FIRST if key in dumped} | dumped


class _Distillation(_Stage):
    """What a stage with teachers has."""

    teacher_max_length: Whole | None = Field(
        None,
        gt=0,
        description="trainer.max_length of what a teacher sees of a row with `teacher_prompt`; default: the same. `overlong` "
        "holds for longer rows.",
    )
    loss: Objective = Field(Objective(), description="The objective.")
    select: Selection | None = Field(
        None, description="Keep the checkpoint that gained most among those that forgot little; default: the last one."
    )

    @property
    def follows_itself(self) -> bool:
        """Whether every teacher is the student that the stage begins with: then nothing is learned of them."""
        student = self.student or ModelSpec()
        named = [spec for spec in self.teachers_by_key().values() if spec.kind != "student"]
        return all(spec.model is not None and self._is_student(spec.model, student) for spec in named)

    def _is_student(self, model: ModelSpec, student: ModelSpec) -> bool:
        if model.adapter is not None:
            return model.adapter == (BARE_BASE if self.lora is not None else student.adapter)
        same = ("dtype", "quantization", "adapter", "init", "config", "revision", "stage", "checkpoint")
        if model.config is not None or any(getattr(model, key) != getattr(student, key) for key in same):
            return False
        return same_base(model.path, student.path) if model.path and student.path else model.path == student.path

    def problems(self) -> Problems:
        """What its teachers cannot be asked for."""
        yield from super().problems()
        loss = self.loss
        for path, model in self.models().items() if loss.attention_weight else ():
            kind = model.attn_implementation
            if kind is not None and kind != "sdpa" and "flash" not in kind and path[:2] != ("student", "from"):
                remedy = "use one of them, or set loss.attention_weight to 0"
                yield (*path, "attn_implementation"), f"{kind}: the attention loss sees sdpa and flash_attention only; {remedy}"
        if self.select is not None and self.trainer.get("eval_strategy", "no") == "no":
            yield "select", "needs evaluations while the stage trains; set trainer.eval_strategy, eval_steps and save_steps"
        for key, teacher in self.teachers_by_key().items():
            yield from ((("loss", wrong), message) for wrong, message in teacher.cannot(loss, dotted(key)))
            if teacher.kind == "student" and teacher.cache is not None and key != ("reference",):
                yield key, "only a reference is the student itself; a teacher is a model, an ensemble or labels"
        if loss.on_policy and self.trainer.get("packing"):
            remedy = "set padding_free and max_length: null, or loss.on_policy to 0"
            yield ("trainer", "packing"), f"lays rows into blocks before the student has written responses; {remedy}"
        length = self.trainer.get("max_length")
        if loss.on_policy and isinstance(length, int) and loss.max_new_tokens >= length:
            message = f"leaves no room for a prompt within trainer.max_length: {length}; lower it"
            yield ("loss", "max_new_tokens"), message


class SFTStage(_Stage):
    """Cross-entropy on the data's own tokens."""

    ELSEWHERE: ClassVar = _NOT_IN_SFT
    type: Annotated[Literal["sft"], Choice]

    @property
    def loss(self) -> Objective:
        """The cross-entropy alone."""
        return Objective(ce_weight=1.0, prediction_weight=0.0)


class KDStage(_Distillation):
    """Follow one teacher on all rows."""

    ELSEWHERE: ClassVar = _NOT_IN_KD
    type: Annotated[Literal["kd"], Choice]
    teacher: TeacherSpec = Field(description="The teacher to follow.")

    def teachers_by_key(self) -> dict[KeyPath, TeacherSpec]:
        """See the base class."""
        return {("teacher",): self.teacher} if self.teacher is not None else {}


class DAEStage(_Distillation):
    """Follow the teacher of each row's domain; rows of ``reference_domains`` follow the reference."""

    ELSEWHERE: ClassVar = {"teacher": "a dae stage names a teacher per domain: `teachers: {DOMAIN: MODEL}`"}
    type: Annotated[Literal["dae"], Choice]
    teachers: dict[str, TeacherSpec] = Field(min_length=1, description="Domain -> teacher.")
    reference: TeacherSpec | None = Field(
        None, description="Whom to follow on reference_domains; default: the student as it is, frozen."
    )
    reference_domains: tuple[Text, ...] = Field(("general",), description="Domains that follow the reference.")
    preflight: Flag = Field(
        True,
        description="Compare each expert with the student on held-out rows of its domain before the first step, for a minute "
        "at most, and say so if it is not better.",
    )

    def teachers_by_key(self) -> dict[KeyPath, TeacherSpec]:
        """See the base class."""
        found: dict[KeyPath, TeacherSpec] = {("teachers", domain): each for domain, each in (self.teachers or {}).items()}
        if self.reference is not None:
            found["reference",] = self.reference
        return {key: each for key, each in found.items() if each is not None}

    def domains_of(self, key: KeyPath, present: Iterable[str]) -> list[str]:
        """See the base class."""
        mine = key[1:] if key[0] == "teachers" else self.reference_domains
        return [domain for domain in present if domain in mine]

    def problems(self) -> Problems:
        """See the base class; the rows of a domain follow one teacher."""
        yield from super().problems()
        for domain in self.teachers or ():
            if domain in self.reference_domains:
                message = f"the domain {domain!r} is also in reference_domains; its rows can follow only one of them"
                yield ("teachers", domain), message


STAGES = {"sft": SFTStage, "kd": KDStage, "dae": DAEStage}
StageSpec: TypeAlias = SFTStage | KDStage | DAEStage
