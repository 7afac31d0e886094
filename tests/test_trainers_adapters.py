"""DAE and KD on one base: experts, reference and student are adapters of it, loaded once, also on four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daekit.data.collator import as_batch
from daekit.errors import UserError
from daekit.models.adapters import load_continued
from daekit.models.backbone import base_of
from daekit.recipe.schema import ModelSpec
from daekit.teachers import BASE, AdapterPath, AdapterTeacher, EnsembleTeacher, ModelTeacher
from daekit.trainers import DAEConfig, DAETrainer
from tests.helpers import tiny
from tests.helpers.adapter_world import load, lora, merged, save_adapter, save_base
from tests.helpers.trainer_world import V, dae, kd, logged, loss_and_gradient, micro_batches, weights

ROWS = tiny.rows(8, domains=("general", "shop"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and the adapters ``expert`` and ``start`` of it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    save_adapter(folder / "expert", folder / "base", seed=3)
    save_adapter(folder / "start", folder / "base", seed=4, dtype=torch.bfloat16)
    return folder


def shared(folder: Path, world: Path, student: Any = None, **changes: Any) -> DAETrainer:
    """The expert is an adapter from disk, the reference the bare base unless given."""
    arguments: dict[str, Any] = dict(teachers={"shop": AdapterPath(str(world / "expert"))}, reference=BASE)
    if student is None:
        student, arguments["peft_config"] = load(world / "base"), lora()
    return dae(folder, ROWS, student, **(arguments | changes))


def separate(folder: Path, world: Path, **changes: Any) -> DAETrainer:
    """The same with three models."""
    arguments: dict[str, Any] = dict(
        teachers={"shop": merged(world / "base", world / "expert")}, reference=load(world / "base"), peft_config=lora()
    )
    return dae(folder, ROWS, load(world / "base"), **(arguments | changes))


def alike(student: Any, other: Any) -> None:
    """Give a student the other one's trained weights."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(theirs[name])


OPTIONS: dict[str, dict[str, Any]] = {
    "padded": {},
    "checkpointing": dict(gradient_checkpointing=True),
    "packed": dict(packing=True, max_length=64),
    "inside": dict(attention_weight=1.0, hidden_weight=1.0),
}


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_one_base_gives_the_loss_and_the_gradient_of_three_models(kind: str, world: Path, tmp_path: Path) -> None:
    options = OPTIONS[kind]
    one, three = shared(tmp_path / "one", world, **options), separate(tmp_path / "three", world, **options)
    alike(three.model, one.model)
    if kind == "checkpointing":
        one.model.gradient_checkpointing_enable({"use_reentrant": False})
    (loss, gradient), (same, too) = (loss_and_gradient(each, micro_batches(each, 8)) for each in (one, three))
    assert loss == pytest.approx(same, rel=1e-5)
    learnt = [p.grad for p in one.model.parameters() if p.requires_grad]
    assert all(each is not None and each.abs().sum() > 0 for each in learnt)
    assert float(gradient.norm()) == pytest.approx(float(too.norm()), rel=1e-4)
    theirs = dict(three.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_the_base_is_there_once_and_frozen_adapters_stay_out(world: Path, tmp_path: Path) -> None:
    trainer = shared(tmp_path, world, save_strategy="steps", save_steps=2, max_steps=4, num_train_epochs=9, optim="adamw_torch")
    base = {id(p) for name, p in trainer.model.named_parameters() if "lora" not in name}
    assert len(base) == len(list(load(world / "base").parameters()))
    expert = trainer.teacher.routes["shop"]
    assert isinstance(expert, AdapterTeacher) and expert.model is trainer.model
    before = trainer.teacher.identity()
    trainer.train()
    assert trainer.teacher.identity() == before
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in trained}
    assert names and all(".default" in name for name in names)
    assert names == {name for name, _ in trainer.model.named_parameters() if ".default" in name}
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-4", tmp_path / "final"):
        assert [path.parent for path in folder.rglob("adapter_model.safetensors")] == [folder]
        saved = load_file(folder / "adapter_model.safetensors")
        assert {name.replace(".default", "") for name in names} == saved.keys()
    final = weights(trainer.model)
    again = shared(tmp_path, world, save_strategy="steps", save_steps=2, max_steps=4, num_train_epochs=9, optim="adamw_torch")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), final)
    other = shared(tmp_path, world, reference=AdapterPath(str(world / "start")), max_steps=4, num_train_epochs=9)
    with pytest.raises(UserError, match=r"belongs to another run .*teacher"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "4bit")])
@pytest.mark.parametrize("reference", ["a copy", "its adapter on disk"])
def test_the_student_itself_as_reference_is_a_loss_of_zero(
    reference: str, dtype: Any, quantization: Any, world: Path, tmp_path: Path
) -> None:
    """At step 0 and after a resume; the student goes on with an adapter that TRL keeps in bfloat16 on four bits."""
    start = str(world / "start")
    spec = ModelSpec(path=str(world / "base"), adapter=start, quantization=quantization, dtype=dtype)

    def trainer() -> DAETrainer:
        return shared(
            tmp_path,
            world,
            load_continued(spec),
            teachers={"shop": AdapterPath(start)},
            reference=None if reference == "a copy" else AdapterPath(start),
            learning_rate=0.0,
            save_strategy="steps",
            save_steps=1,
            max_steps=3,
            num_train_epochs=9,
        )

    straight = trainer()
    kept = torch.bfloat16 if quantization else torch.float32
    assert {p.dtype for name, p in straight.model.named_parameters() if "lora" in name} == {kept}
    straight.train()
    assert logged(straight, "kl") == logged(straight, "loss") == [0.0, 0.0, 0.0]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "kl") == [0.0, 0.0, 0.0]
    with torch.no_grad():
        next(p for p in resumed.model.parameters() if p.requires_grad).add_(0.1)
    assert resumed.evaluate(ROWS)["eval_kl"] > 0


def test_kd_from_an_adapter_and_from_an_ensemble_of_adapters(world: Path, tmp_path: Path) -> None:
    adapter = AdapterPath(str(world / "expert"))
    ensemble = EnsembleTeacher([adapter, BASE], [0.3, 0.7])
    one = kd(tmp_path / "one", ROWS, load(world / "base"), ensemble, peft_config=lora())
    assert ensemble.members == [adapter, BASE]  # the user's object is as it was
    members = [ModelTeacher(merged(world / "base", world / "expert"), V), ModelTeacher(load(world / "base"), V)]
    models = EnsembleTeacher(members, [0.3, 0.7])
    two = kd(tmp_path / "two", ROWS, load(world / "base"), models, peft_config=lora())
    alike(two.model, one.model)
    assert loss_and_gradient(one, micro_batches(one, 8))[0] == pytest.approx(loss_and_gradient(two, micro_batches(two, 8))[0])
    single = kd(tmp_path / "single", ROWS, load(world / "base"), adapter, peft_config=lora())
    assert isinstance(single.teacher, AdapterTeacher)


def test_the_tokens_that_frozen_models_see_in_a_step(world: Path, tmp_path: Path) -> None:
    trainer = shared(tmp_path, world, max_steps=2, num_train_epochs=9)
    seen: list[tuple[bool, int]] = []
    embeddings = base_of(trainer.model).get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: seen.append((torch.is_grad_enabled(), inputs[0].numel())))
    tokens = [as_batch(batch).labels_BT.numel() for batch in micro_batches(trainer, 4)]
    seen.clear()
    loss_and_gradient(trainer, micro_batches(trainer, 4))
    assert [count for learns, count in seen if not learns] == tokens
    assert [count for learns, count in seen if learns] == tokens


def test_adapters_are_refused_before_the_student_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "other", seed=9)
    monkeypatch.setattr("daekit.trainers.given.load_student", lambda *_: pytest.fail("the student was loaded"))

    def trainer(student: str, **arguments: Any) -> DAETrainer:
        args = DAEConfig(str(tmp_path / "run"), use_cpu=True, report_to="none")
        teachers = {"shop": AdapterPath(str(world / "expert"))}
        return DAETrainer(student, teachers, BASE, args, ROWS, processing_class=tiny.tokenizer(), **arguments)

    with pytest.raises(UserError, match=r"is an adapter of .*base', not of the student's base .*other'"):
        trainer(str(tmp_path / "other"), peft_config=lora())
    with pytest.raises(UserError, match=r"the student is trained whole\. Give peft_config"):
        trainer(str(world / "base"))
