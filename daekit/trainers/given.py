"""What a user gives a trainer, a path, a hub id or a model, as what the trainer needs: student, tokenizer, Teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from daekit.errors import UserError
from daekit.models.loading import load_tokenizer_of, load_whole
from daekit.models.placement import free_memory
from daekit.models.restore import ALWAYS
from daekit.models.split_loading import give_back_pieces, read_parts, waits
from daekit.models.start_checks import require_plain_head, require_rows_apart
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.protocol import Teacher
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from daekit.teachers.parts import frozen_models, on_student, require_served
from daekit.teachers.sharding import Sharding, shard_teacher

logger = logging.getLogger(__name__)


def arguments_of(trainer: type, args: Any, model: Any) -> Any:
    """The arguments of a trainer, which are of its own class; for None those that a student is trained with by default."""
    config: type = trainer.config_class  # type: ignore[attr-defined]
    if args is None:
        return config(f"{name_of(model)}-{trainer._name.replace(' ', '-')}")  # type: ignore[attr-defined]
    if not isinstance(args, config):
        raise UserError(f"args: {trainer.__name__} needs a {config.__name__}, not a {type(args).__name__}")
    return args


def load_student(path: str, args: SFTConfig, quantization_config: Any = None, split: bool = False) -> PreTrainedModel:
    """Load a student as SFTTrainer does (``args.model_init_kwargs``; float32 unless told otherwise), and whole.

    With ``split`` its weights are read when FSDP2 has split it (``read_student``).

    Raises:
        UserError: weights that are missing, of another shape, or a pickle; ``quantization_config`` given twice.
    """
    arguments = dict(args.model_init_kwargs or {})
    for name, value in ALWAYS.items():
        if arguments.pop(name, value) != value:
            raise UserError(
                f"model_init_kwargs={{{name!r}: {args.model_init_kwargs[name]!r}}} is not supported: students are loaded from "
                "whole safetensors files only. Leave it out."
            )
    if quantization_config is not None:
        if "quantization_config" in arguments:
            raise UserError("quantization_config is given twice, to the trainer and in model_init_kwargs: keep one")
        arguments["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        arguments["device_map"] = None  # "auto" would spread the student over the devices of the other ranks
    arguments.setdefault("trust_remote_code", args.trust_remote_code)
    return load_whole(create_model_from_path, path, arguments, split)


def look_at_student(trainer: Any) -> None:
    """Try the student on a few tokens, unless its weights wait on the disk; then it is done once they are read.

    Raises:
        UserError: NaN, a head of another kind, packed rows that it does not keep apart.
    """
    if waits(trainer.model):
        return
    require_plain_head(trainer.model, trainer.vocab_size)
    if trainer.padding_free:
        require_rows_apart(trainer.model, "student")


def require_trained(model: nn.Module) -> None:
    """UserError for a student of which no parameter is trained; it can be evaluated."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model: {name_of(model)} has no trained parameter (requires_grad is False for all); nothing would change"
        )


def make_room(trainer: Any) -> None:
    """Before FSDP2 splits a student that waits on the disk: accelerate would fill a whole copy in float32."""
    if waits(trainer.model) and trainer.accelerator.mixed_precision != "no":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def read_student(trainer: Any) -> None:
    """Read the rank's part of a student that FSDP2 has split, and look at it as at any other; nothing of one that is there.

    Raises:
        UserError: see ``look_at_student``; a resumed checkpoint of another student.
    """
    if not waits(trainer.model):
        return
    read_parts(trainer.model)
    look_at_student(trainer)
    give_back_pieces(trainer.model)
    free_memory()
    trainer.checkpoints.compare_facts()


def tokenizer_of(model: Any, args: SFTConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a student, which is a path or a model; UserError if there is none."""
    spec = spec_of(model, args) if isinstance(model, str) else ModelSpec(path=model.config._name_or_path or None)
    if spec.path is None:
        raise UserError("processing_class is missing: the student was not loaded from a directory that holds its tokenizer")
    return load_tokenizer_of(spec)


def spec_of(path: str, args: SFTConfig | None) -> ModelSpec:
    """Which model a student's path means, as far as config and tokenizer depend on it."""
    arguments: Mapping[str, Any] = (args.model_init_kwargs if args is not None else None) or {}
    trusted = arguments.get("trust_remote_code", args is not None and args.trust_remote_code)
    return ModelSpec(path=path, revision=arguments.get("revision"), trust_remote_code=trusted)


def name_of(model: Any) -> str:
    """The last part of a student's path; its type where it has none."""
    path = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
    return path.rstrip("/").split("/")[-1]


def as_teacher(
    teacher: str | Path | PreTrainedModel | PeftModel | Teacher,
    tokenizer: PreTrainedTokenizerBase,
    student: Any = None,
    split: bool = False,
) -> Teacher:
    """A Teacher from whatever names one: a path or hub id, a model; a Teacher as it is. ``split`` as in ``load_model``.

    Raises:
        UserError: another tokenizer, the student's own model, or something that is no teacher.
    """
    if isinstance(teacher, str | Path):
        return ModelTeacher.from_pretrained(str(teacher), tokenizer, vocabulary_size(tokenizer), split)
    if isinstance(teacher, PreTrainedModel | PeftModel):
        if isinstance(student, nn.Module) and {*map(id, teacher.parameters())} & {*map(id, student.parameters())}:
            raise UserError("the teacher is the student itself: as a frozen teacher it could not be trained. Load it twice.")
        path = teacher.config._name_or_path
        _compare_tokenizers(tokenizer, path)
        return ModelTeacher(teacher, vocabulary_size(tokenizer), path or "teacher")
    if isinstance(teacher, Teacher):
        return teacher
    raise UserError(
        f"{type(teacher).__name__} is no teacher: give a directory or hub id, a transformers model, or an object with the "
        "methods outputs(batch, capture), identity() and to(device)"
    )


def completed_teacher(trainer: Any, teacher: Teacher, vocab_size: int) -> Teacher:
    """The teacher of a trainer whose student is ready: made on it where it is only named, placed as the student is, checked.

    Raises:
        UserError: tokens that TRL has added to the ``vocab_size`` ones that the teacher knows; an objective, tokenizer or rows
            that it does not serve; packed rows that its models do not keep apart.
    """
    if trainer.vocab_size != vocab_size:
        raise UserError(
            f"chat_template_path={trainer.args.chat_template_path!r} added {trainer.vocab_size - vocab_size} tokens to "
            "the student's tokenizer, which its teacher does not have. Set the tokenizer's chat_template yourself, "
            "without new tokens."
        )
    teacher = on_student(teacher, trainer.model, vocab_size)
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"eval": trainer.eval_dataset}
    datasets = [trainer.train_dataset, *evaluated.values()]
    require_served(teacher, trainer.loss_objective, trainer.processing_class, datasets)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        shard_teacher(teacher, Sharding(trainer.accelerator))
    else:
        teacher.to(trainer.accelerator.device)
    if trainer.padding_free:
        for name, model in frozen_models(teacher):
            require_rows_apart(model, f"teacher {name}")
    return teacher


def _compare_tokenizers(tokenizer: PreTrainedTokenizerBase, teacher_path: str) -> None:
    """Compare with the tokenizer beside a teacher that is loaded already, if there is one."""
    try:
        theirs = load_tokenizer_of(ModelSpec(path=teacher_path)) if teacher_path else None
    except UserError:
        theirs = None
    if theirs is None:
        logger.warning("the tokenizer of the teacher is not known, so it is not compared with the student's")
    else:
        require_same(tokenizer, theirs, teacher_path)
