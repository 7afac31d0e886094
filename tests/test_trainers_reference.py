"""DAE's reference None: the student as it stands, frozen; dense, LoRA, a LoRA that goes on training, and QLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from daekit.data.collator import as_batch
from daekit.teachers import AdapterTeacher
from tests.helpers import tiny
from tests.helpers.trainer_world import (
    dae,
    four_bit,
    kd,
    kl_of,
    logged,
    lora,
    loss_and_gradient,
    micro_batches,
    mixed_rows,
    relative,
    weights,
)

GENERAL = tiny.rows(8, domains=("general",))


def trained_adapter(folder: Path, base: Any) -> Path:
    """A directory with an adapter whose B is not zero."""
    model = get_peft_model(base, lora(init_lora_weights=False))
    model.save_pretrained(folder)
    model.unload()
    return folder


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_dense_reference_is_the_student_at_step_0_and_stays_there(kind: str, tmp_path: Any) -> None:
    trainer = dae(tmp_path, mixed_rows(), tiny.model(kind, seed=1), reference=None, max_steps=4, num_train_epochs=9)
    start, ids = weights(trainer.model), torch.arange(3, 20)[None]
    logits = trainer.model(input_ids=ids).logits.detach()
    assert kl_of(trainer, "general") == pytest.approx(0.0, abs=1e-6)
    assert kl_of(trainer, "shop") > 0.1
    trainer.train()
    reference = trainer.teacher.routes["general"].model
    assert torch.equal(torch.cat([p.double().flatten() for _, p in sorted(reference.named_parameters())]), start)
    # its plain forward too is its own, not the one that a trainer hung on the student
    assert torch.allclose(reference(input_ids=ids).logits, logits, atol=1e-6)
    assert relative(weights(trainer.model), start) > 1e-4
    assert kl_of(trainer, "general") > 1e-6


def test_a_lora_reference_is_a_copy_of_the_adapter_on_the_same_base(tmp_path: Any) -> None:
    base = tiny.model(seed=1)
    size, before = sum(p.numel() for p in base.parameters()), len(list(base.parameters()))
    adapter = sum(p.numel() for p in get_peft_model(tiny.model(seed=1), lora()).parameters() if p.requires_grad)
    trainer = dae(
        tmp_path,
        mixed_rows(),
        base,
        reference=None,
        peft_config=lora(lora_dropout=0.1),
        max_steps=3,
        num_train_epochs=9,
        save_strategy="steps",
        save_steps=1,
        optim="adamw_torch",
    )
    assert before and sum(p.numel() for p in trainer.model.parameters()) == size + 2 * adapter  # no second base
    assert isinstance(trainer.teacher.routes["general"], AdapterTeacher)
    assert kl_of(trainer, "general") == 0.0
    trainer.train()
    assert kl_of(trainer, "general") > 0.0
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in trained}
    assert names and all(".default" in name for name in names)
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("adapter_model.safetensors"))]
    assert [str(path) for path in files] == [f"checkpoint-{step}/adapter_model.safetensors" for step in (1, 2, 3)]
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == adapter
    assert not any("reference" in key for key in saved)


def test_going_on_with_a_trained_adapter_its_state_is_the_reference(tmp_path: Any) -> None:
    folder = trained_adapter(tmp_path / "adapter", tiny.model(seed=1))
    student = PeftModel.from_pretrained(tiny.model(seed=1), folder, is_trainable=True)
    merged = PeftModel.from_pretrained(tiny.model(seed=1), folder).merge_and_unload()
    trainer = dae(tmp_path / "run", mixed_rows(), student, reference=None, learning_rate=0.5, max_steps=2, num_train_epochs=9)
    assert kl_of(trainer, "general") == 0.0
    trainer.train()
    ours = kl_of(trainer, "general")
    explicit = dae(tmp_path / "other", mixed_rows(), student.merge_and_unload(), reference=merged)
    assert ours == pytest.approx(kl_of(explicit, "general"), rel=1e-3)
    assert ours > 1e-5


def test_an_adapter_of_another_name_is_saved_and_resumed(tmp_path: Any) -> None:
    student = get_peft_model(tiny.model(seed=1), lora(), adapter_name="student")
    student.add_adapter("expert", lora(init_lora_weights=False))
    expert = AdapterTeacher(student, "expert", len(tiny.WORDS))
    arguments: dict[str, Any] = dict(
        teachers={"shop": expert},
        reference=AdapterTeacher(student, None, len(tiny.WORDS)),
        num_train_epochs=9,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
    )
    trainer = dae(tmp_path, mixed_rows(), student, **arguments)
    trainer.train()
    final = weights(trainer.model)
    saved = [path.parent.name for path in (tmp_path / "checkpoint-2").rglob("adapter_model.safetensors")]
    assert saved == ["student"]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(trainer.model), final)


def test_an_adapter_teacher_leaves_the_student_its_gradient_under_gradient_checkpointing(tmp_path: Any) -> None:
    plain = dae(tmp_path, mixed_rows(), tiny.model(seed=1), reference=None, peft_config=lora())
    checkpointed = dae(
        tmp_path, mixed_rows(), tiny.model(seed=1), reference=None, peft_config=lora(), gradient_checkpointing=True
    )
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = loss_and_gradient(plain, micro_batches(plain, 8))
    same, too = loss_and_gradient(checkpointed, micro_batches(checkpointed, 8))
    assert same == pytest.approx(loss, rel=1e-6)
    assert gradient.norm() > 0
    assert relative(too, gradient) < 1e-5


def test_qlora_trains_and_its_reference_is_the_student_also_after_a_resume(tmp_path: Any) -> None:
    base = tmp_path / "base"
    tiny.model(seed=1, hidden=64).save_pretrained(base)

    def trainer(name: str) -> Any:
        return dae(
            tmp_path / name,
            mixed_rows(),
            four_bit(base),
            reference=None,
            peft_config=lora(),
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
            num_train_epochs=9,
            optim="adamw_torch",
            learning_rate=0.01,
        )

    straight = trainer("run")
    assert {p.dtype for p in straight.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert kl_of(straight, "general") == 0.0
    straight.train()
    final = weights(straight.model)
    assert kl_of(straight, "general") > 0.0
    resumed = trainer("run")
    assert kl_of(resumed, "general") == 0.0
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), final)
    assert kl_of(resumed, "general") == kl_of(straight, "general") > 0.0

    step = kd(tmp_path / "kd", mixed_rows(), four_bit(base), peft_config=lora(), max_steps=1, learning_rate=0.5)
    before = weights(step.model)
    step.train()
    assert relative(weights(step.model), before) > 1e-4
    assert logged(step, "kl")[0] > 0


def test_a_trained_head_is_part_of_the_adapter_and_of_its_copy(tmp_path: Any) -> None:
    config = lora(modules_to_save=["lm_head"])
    trainer = dae(
        tmp_path, mixed_rows(), tiny.model(seed=1), reference=None, peft_config=config, learning_rate=1.0, max_steps=2
    )
    head = trainer.model.get_output_embeddings()
    before = head.modules_to_save["default"].weight.detach().clone()
    assert kl_of(trainer, "general") == 0.0
    trainer.train()
    after = head.modules_to_save["default"].weight.detach()
    assert relative(after, before) > 1e-3
    assert torch.equal(head.modules_to_save["daekit_reference"].weight, before)
    assert kl_of(trainer, "general") > 1e-6


def test_one_teacher_of_several_domains_is_loaded_and_asked_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model(seed=3).save_pretrained(tmp_path / "expert")
    tiny.tokenizer().save_pretrained(tmp_path / "expert")
    loads = []
    monkeypatch.setattr("daekit.teachers.model.load_model", lambda spec, **_: loads.append(spec.path) or tiny.model(seed=3))
    data = tiny.rows(12, domains=("general", "shop", "books"))
    trainer = dae(tmp_path, data, teachers=dict.fromkeys(("shop", "books"), str(tmp_path / "expert")))
    assert loads == [str(tmp_path / "expert")]
    asked = []
    expert = trainer.teacher.routes["shop"].model
    expert.register_forward_hook(lambda *_: asked.append(1))
    loss_and_gradient(trainer, micro_batches(trainer, 12))
    assert len(asked) == 1


@pytest.mark.parametrize("student", ["lora", "dense"])
def test_dropout_acts_on_the_student_and_never_on_its_reference(student: str, tmp_path: Any) -> None:
    peft_config = lora(lora_dropout=0.5, init_lora_weights=False) if student == "lora" else None
    model = tiny.model(seed=1, attention_dropout=0.0 if student == "lora" else 0.5)
    trainer = dae(tmp_path, mixed_rows(), model, reference=None, peft_config=peft_config)
    batch = micro_batches(trainer, 8)
    modules = trainer.model.train().modules()
    first, second = ([s.members[0].hidden_MH for s in trainer.teacher.outputs(as_batch(batch[0]))] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(module.training for module in modules if module is not trainer.model)
    assert loss_and_gradient(trainer, batch)[0] != loss_and_gradient(trainer, batch)[0]
