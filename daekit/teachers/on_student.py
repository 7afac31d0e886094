"""Teachers that are named before the student exists: adapters of its base, loaded onto it when the trainer has wrapped it."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.adapters import require_adapters_fit
from daekit.protocol import Teacher
from daekit.recipe.schema import ModelSpec
from daekit.teachers.adapter import AdapterPath, AdapterTeacher
from daekit.teachers.model import ModelTeacher
from daekit.teachers.parts import CompositeTeacher, leaves


def adapter_paths(teacher: Teacher | AdapterPath) -> list[AdapterPath]:
    """Every AdapterPath in a teacher."""
    return [each for each in leaves(teacher) if isinstance(each, AdapterPath)]


def frozen_models(teacher: Teacher | AdapterPath) -> list[tuple[str, PreTrainedModel]]:
    """The models of a teacher, by name; not those of its student's own base."""
    return [(each.name, each.model) for each in leaves(teacher) if isinstance(each, ModelTeacher)]


def require_on_student(teacher: Teacher | AdapterPath, has_adapter: bool, base: ModelSpec | None) -> None:
    """Look at every AdapterPath in a teacher before the student's weights are loaded.

    Args:
        teacher: any.
        has_adapter: whether the student is or will be a PEFT model.
        base: the student, if it is yet to be loaded; of one that is there its adapters are looked at when they are loaded.

    Raises:
        UserError: a student without an adapter; an adapter of another base, incomplete, or on the output head or embeddings.
    """
    paths = adapter_paths(teacher)
    if paths and not has_adapter:
        raise UserError(
            f"{paths[0]}: is an adapter of the student's base, but the student is trained whole. Give peft_config to make it a "
            "LoRA student, or give a merged model as teacher."
        )
    folders = [each.path for each in paths if each.path is not None]
    if folders and base is not None:
        require_adapters_fit(folders, base)


def on_student(
    teacher: Teacher | AdapterPath, student: nn.Module, vocab_size: int, loaded: dict[AdapterPath, Teacher] | None = None
) -> Teacher:
    """``teacher`` with each AdapterPath in it loaded onto the student, once; what holds none is returned as it is.

    Raises:
        UserError: what ``AdapterTeacher.from_pretrained`` refuses.
    """
    loaded = {} if loaded is None else loaded
    if isinstance(teacher, AdapterPath):
        assert isinstance(student, PeftModel), "require_on_student has looked"
        if teacher not in loaded:
            loaded[teacher] = (
                AdapterTeacher(student, None, vocab_size)
                if teacher.path is None
                else AdapterTeacher.from_pretrained(student, teacher.path, vocab_size)
            )
        return loaded[teacher]
    if not adapter_paths(teacher):
        return teacher
    assert isinstance(teacher, CompositeTeacher)
    return teacher.with_parts(lambda part: on_student(part, student, vocab_size, loaded))
