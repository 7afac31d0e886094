"""What a training asks of teachers: a kind of teacher that daekit does not know says of itself what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import daekit
from daekit.errors import UserError
from daekit.losses import Objective
from daekit.protocol import Batch, Teacher, TeacherOutput
from daekit.teachers import BASE, AdapterPath, EnsembleTeacher, ModelTeacher, RoutedTeacher
from daekit.teachers.parts import frozen_models, leaves, on_student, require_on_student, require_served
from tests.helpers import tiny
from tests.helpers.trainer_world import V, kd


class Strange:
    """A teacher of a kind of its own, made of another; it serves temperature 1 only and is made on the student."""

    def __init__(self, part: Any, seen: list[Any]) -> None:
        self.part, self.seen = part, seen

    def outputs(self, batch: Batch, capture: Any = None) -> list[TeacherOutput]:
        return self.part.outputs(batch, capture)

    def identity(self) -> dict[str, object]:
        return {"kind": "strange"}

    def to(self, device: torch.device) -> Teacher:
        return self


class Composed(Strange):
    def parts(self) -> list[Any]:
        return [(self.part, None)]

    def with_parts(self, made_of: Callable[[Teacher], Teacher]) -> Teacher:
        return Composed(made_of(self.part), self.seen)


class Demanding(Strange):
    def require_served(self, objective: Objective, tokenizer: Any, rows: Any) -> None:
        self.seen.append([row.input_ids.tolist() for row in rows])
        if objective.temperature != 1.0:
            raise UserError("temperature: only 1")


class Named(Strange):
    def require_student(self, has_adapter: bool, base: Any) -> None:
        self.seen.append(has_adapter)

    def on_student(self, student: Any, vocab_size: int) -> Teacher:
        return ModelTeacher(self.part, vocab_size, "made")


def test_parts_keep_the_domains_whose_rows_follow_them() -> None:
    a, b = Strange(None, []), Strange(None, [])
    routed = RoutedTeacher({"shop": Composed(a, []), "general": b, "law": b})
    assert leaves(routed) == {a: {"shop"}, b: {"general", "law"}}
    assert leaves(EnsembleTeacher([routed, b])) == {a: {"shop"}, b: None}


def test_a_part_is_asked_about_its_own_rows_only() -> None:
    domains, demanding = ["shop", "general", "shop", "law"], Demanding(None, [])
    ids = [[n, n + 1] for n in range(4)]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "domain": domains})
    other = Strange(None, [])
    teacher = RoutedTeacher({"shop": Composed(demanding, []), "general": other, "law": other})
    require_served(teacher, Objective(), tiny.tokenizer(), [data])
    assert demanding.seen == [[[0, 1], [2, 3]]]
    with pytest.raises(UserError, match="temperature: only 1"):
        require_served(teacher, Objective(temperature=2.0), tiny.tokenizer())


def test_a_teacher_is_made_once_wherever_it_is_named() -> None:
    named = Named(tiny.model(seed=2), [])
    whole = Composed(Strange(None, []), [])
    teacher = RoutedTeacher({"shop": Composed(named, []), "general": EnsembleTeacher([named, whole]), "law": whole})
    require_on_student(teacher, False, None)
    assert named.seen == [False]
    made = on_student(teacher, tiny.model(), V)
    assert made.routes["law"] is whole
    assert made.routes["shop"].part is made.routes["general"].members[0]
    assert frozen_models(made) == [("made", named.part)] and frozen_models(teacher) == []


def test_a_trainer_takes_it(tmp_path: Path) -> None:
    own = kd(tmp_path, tiny.rows(4), teacher=Composed(Named(tiny.model(seed=2), []), []))
    plain = kd(tmp_path, tiny.rows(4), teacher=tiny.model(seed=2))
    assert own.evaluate(tiny.rows(4))["eval_kl"] == plain.evaluate(tiny.rows(4))["eval_kl"] > 0


@pytest.mark.parametrize("named", [AdapterPath("somewhere"), BASE], ids=str)
def test_an_adapter_that_no_trainer_has_loaded_says_so(named: AdapterPath) -> None:
    both = EnsembleTeacher([ModelTeacher(tiny.model(seed=2), V), named])
    for teacher in (named, both, RoutedTeacher({"": both})):
        for ask in (lambda t: t.outputs(batch()), lambda t: t.to(torch.device("cpu")), lambda t: t.identity()):
            with pytest.raises(UserError, match=r"AdapterPath\(.*names a teacher on the student's own base"):
                ask(teacher)


def batch() -> Batch:
    ids = torch.arange(4)[None]
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, torch.zeros_like(ids), ("",))


def test_what_a_teacher_is_written_with_is_exported() -> None:
    for name in (
        "Batch",
        "Features",
        "FeatureSpec",
        "FeatureTeacher",
        "Member",
        "OutputHead",
        "Teacher",
        "TeacherOutput",
        "TopK",
    ):
        assert getattr(daekit, name).__module__ == "daekit.protocol"
        assert name in daekit.__all__
