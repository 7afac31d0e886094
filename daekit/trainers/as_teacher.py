"""A Teacher from whatever a user gives: a path or hub id, a model, an adapter's path, a Teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.loading import load_tokenizer_of
from daekit.models.vocabulary import require_same, vocabulary_size
from daekit.protocol import Teacher
from daekit.recipe.schema import ModelSpec
from daekit.teachers import AdapterPath, ModelTeacher

logger = logging.getLogger(__name__)


def as_teacher(
    teacher: str | Path | PreTrainedModel | PeftModel | Teacher | AdapterPath,
    tokenizer: PreTrainedTokenizerBase,
    student: Any = None,
) -> Teacher | AdapterPath:
    """A Teacher from whatever names one: a path or hub id, a model; a Teacher and an AdapterPath as they are.

    Raises:
        UserError: another tokenizer, the student's own model, or something that is no teacher.
    """
    if isinstance(teacher, str | Path):
        return ModelTeacher.from_pretrained(str(teacher), tokenizer, vocabulary_size(tokenizer))
    if isinstance(teacher, PreTrainedModel | PeftModel):
        if isinstance(student, nn.Module) and {*map(id, teacher.parameters())} & {*map(id, student.parameters())}:
            raise UserError("the teacher is the student itself: as a frozen teacher it could not be trained. Load it twice.")
        _compare_tokenizers(tokenizer, teacher.config._name_or_path)
        return ModelTeacher(teacher, vocabulary_size(tokenizer), teacher.config._name_or_path or "teacher")
    if isinstance(teacher, Teacher | AdapterPath):
        return teacher
    raise UserError(
        f"{type(teacher).__name__} is no teacher: give a directory or hub id, a transformers model, or an object with the "
        "methods outputs(batch, capture), identity() and to(device)"
    )


def _compare_tokenizers(tokenizer: PreTrainedTokenizerBase, teacher_path: str) -> None:
    """Compare with the tokenizer that lies beside a teacher that is loaded already, if there is one."""
    try:
        theirs = load_tokenizer_of(ModelSpec(path=teacher_path)) if teacher_path else None
    except UserError:
        theirs = None
    if theirs is None:
        logger.warning("the tokenizer of the teacher is not known, so it is not compared with the student's")
    else:
        require_same(tokenizer, theirs, teacher_path)
