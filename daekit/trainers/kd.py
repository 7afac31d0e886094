"""Knowledge distillation: SFTTrainer plus a teacher."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.loading import load_tokenizer_of
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.protocol import Batch, Signal, Teacher
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from daekit.teachers.on_student import on_student, require_on_student
from daekit.teachers.sharding import Sharding, shard_teacher
from daekit.trainers.config import KDConfig
from daekit.trainers.domain_sft import DomainSFTTrainer
from daekit.trainers.engines import receives_teachers, refuse_reentrant
from daekit.trainers.inside import ATTENTION_METRIC, InsideLosses, hidden_metric
from daekit.trainers.projections import forget_projections, without_projections
from daekit.trainers.student import spec_of, tokenizer_of

logger = logging.getLogger(__name__)


class KDTrainer(DomainSFTTrainer):
    """``trl.SFTTrainer`` whose student follows a teacher's next-token distribution.

    ``loss = (ce_weight * CE + prediction_weight * T^2 * D(teacher, student)) / kept tokens of the global batch`` (nats).
    Logged besides what DomainSFTTrainer logs: ``kl/<domain>`` (or ``reverse_kl``, ``jsd``), with its T^2.

    Args:
        model: the student, as for SFTTrainer: a hub id, a directory, a model or a PEFT model.
        teacher: a directory or hub id (its tokenizer is compared before its weights are loaded), a model (compared if its
            tokenizer lies where it was loaded from), an ``AdapterPath`` or ``BASE`` (adapters of a LoRA student's own base,
            which is then loaded once), or any Teacher.
        args: a KDConfig.
        train_dataset: rows in any of TRL's forms.
        processing_class: the tokenizer; default: the student's own.
        sft_arguments: further arguments of SFTTrainer (``eval_dataset``, ``peft_config``, ``callbacks``...).

    Raises:
        UserError: a teacher with another tokenizer, and what DomainSFTTrainer refuses.
    """

    _tag_names = ["trl", "daekit", "kd"]
    _name = "KD"
    config_class = KDConfig

    def __init__(
        self,
        model: Any,
        teacher: str | PreTrainedModel | Teacher,
        args: KDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **sft_arguments: Any,
    ) -> None:
        tokenizer = processing_class or tokenizer_of(model, args)
        forget_projections(model)
        self.teacher = as_teacher(teacher, tokenizer, model, args is not None and receives_teachers(args))
        spec = spec_of(model, args) if isinstance(model, str) else None
        require_on_student(self.teacher, isinstance(model, PeftModel) or sft_arguments.get("peft_config") is not None, spec)
        size = vocabulary_size(tokenizer)
        super().__init__(model, args, train_dataset, processing_class=tokenizer, **sft_arguments)
        if self.vocab_size != size:
            raise UserError(
                f"chat_template_path={self.args.chat_template_path!r} added {self.vocab_size - size} tokens to the student's "
                "tokenizer, which its teacher does not have. Set the tokenizer's chat_template yourself, without new tokens."
            )
        self._complete_teacher()
        self._place_teacher()
        wanted = self.args.attention_weight or self.args.hidden_weight
        if wanted:
            refuse_reentrant(self)
        self.inside = InsideLosses(self.model, self.args, self.teacher) if wanted else None
        if self.inside is not None and self.inside.projections is not None and self.optimizer is not None:
            raise UserError(
                "optimizers: an optimizer of your own does not hold the projections that hidden_weight needs for a teacher of "
                "another width, so they would stay random. Leave it out, or set hidden_weight to 0."
            )

    def _complete_teacher(self) -> None:
        """The student is ready: the moment to load adapters onto its base, and to freeze a copy of it as a teacher."""
        self.teacher = on_student(self.teacher, self.model, self.vocab_size)

    def _place_teacher(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            shard_teacher(self.teacher, Sharding(self.accelerator))
        else:
            self.teacher.to(self.accelerator.device)

    def teacher_signals(self, batch: Batch) -> list[Signal]:
        """What the teacher says about the batch; UserError if it says nothing, for the loss would be 0 without a word."""
        signals = self.teacher.signals(batch)
        if not signals and batch.labels_N.numel():
            raise UserError(
                f"{type(self.teacher).__name__} says nothing about a batch of {batch.labels_N.numel()} kept positions: its "
                "signals must cover every kept position exactly once"
            )
        if self.inside is not None:
            self.inside.begin(batch, signals)
        return signals

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step; the backward pass of a checkpointed layer must find the attention probe, too."""
        with self._watching():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """See DomainSFTTrainer."""
        with self._watching():
            return super().compute_loss(*args, **kwargs)

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self.inside is None else self.inside.watching()

    def _losses(self, outputs: Any, batch: Batch, signals: list[Signal]) -> dict[str, Tensor]:
        out = super()._losses(outputs, batch, signals)
        if self.inside is None:
            return out
        inside = self.inside.finish()
        return out | inside | {"loss": out["loss"] + inside["loss"]}

    def weights(self) -> dict[str, float]:
        """See DomainSFTTrainer."""
        args = self.args
        return super().weights() | {ATTENTION_METRIC: args.attention_weight, hidden_metric(args): args.hidden_weight}

    def run_facts(self) -> dict[str, Any]:
        """See WholeCheckpointTrainer; the teacher and what is compared inside it belong to them."""
        args = self.args
        inside = {
            "attention": [args.attention_weight, args.attention_layers, args.attention_relation_heads],
            "hidden": [args.hidden_weight, args.hidden_layers, args.hidden_loss],
        }
        return super().run_facts() | {"teacher": self.teacher.identity()} | (inside if self.inside is not None else {})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, None if state_dict is None else without_projections(state_dict))
        if self.inside is not None and self.inside.projections is not None:
            self.inside.projections.save(Path(output_dir or self.args.output_dir), self.args.should_save)

    def _restore_further(self, folder: Path) -> None:
        if self.inside is not None and self.inside.projections is not None:
            self.inside.projections.load(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_further(Path(self.state.best_model_checkpoint))


def as_teacher(
    teacher: str | Path | PreTrainedModel | PeftModel | Teacher,
    tokenizer: PreTrainedTokenizerBase,
    student: Any = None,
    hollow: bool = False,
) -> Teacher:
    """A Teacher from whatever names one: a path or hub id, a model, or a Teacher as it is.

    With ``hollow`` one of a path has no weights yet, see ``ModelTeacher.from_pretrained``.

    Raises:
        UserError: another tokenizer, the student's own model, or something that is no teacher.
    """
    if isinstance(teacher, str | Path):
        return ModelTeacher.from_pretrained(str(teacher), tokenizer, vocabulary_size(tokenizer), hollow)
    if isinstance(teacher, PreTrainedModel | PeftModel):
        if isinstance(student, nn.Module) and {*map(id, teacher.parameters())} & {*map(id, student.parameters())}:
            raise UserError("the teacher is the student itself: as a frozen teacher it could not be trained. Load it twice.")
        _compare_tokenizers(tokenizer, teacher.config._name_or_path)
        return ModelTeacher(teacher, vocabulary_size(tokenizer), teacher.config._name_or_path or "teacher")
    if isinstance(teacher, Teacher):
        return teacher
    raise UserError(
        f"{type(teacher).__name__} is no teacher: give a directory or hub id, a transformers model, or an object with the "
        "methods signals(batch), identity() and to(device)"
    )


def _compare_tokenizers(tokenizer: PreTrainedTokenizerBase, teacher_path: str) -> None:
    """Compare with the tokenizer that lies beside a teacher that is loaded already, if there is one."""
    try:
        theirs = load_tokenizer_of(ModelSpec(path=teacher_path)) if teacher_path else None
    except UserError:
        theirs = None
    if theirs is None:
        logger.warning("the tokenizer of the teacher is not known: nobody checks that it is the student's")
    else:
        require_same(tokenizer, theirs, teacher_path)
