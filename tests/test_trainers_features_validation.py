"""What the losses that look inside leave behind, share, and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import HfArgumentParser

from daekit.data.collator import as_batch
from daekit.errors import UserError
from daekit.losses.attention_blocks import attention_kl_
from daekit.models.backbone import checkpointed_layers
from daekit.protocol import Batch, FeatureSpec, TeacherOutput
from daekit.teachers import EnsembleTeacher, ModelTeacher
from daekit.trainers import DAEConfig, DAETrainer, KDConfig, KDTrainer
from tests.helpers import tiny
from tests.helpers.trainer_world import V, dae, kd, logged, loss_and_gradient, micro_batches, options, relative, weights

HIDDEN = {"hidden_weight": 0.6, "prediction_weight": 0.5}


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **fields)


@pytest.mark.parametrize("config", [KDConfig, DAEConfig])
def test_configs_are_read_from_a_command_line(config: type, tmp_path: Any) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--attention_weight", "1", "--attention_layers", "last_4"]
    (read,) = HfArgumentParser(config).parse_args_into_dataclasses(arguments)
    assert (read.attention_weight, read.attention_layers, read.hidden_layers) == (1.0, "last_4", "uniform")


def test_one_teacher_of_two_trainers(tmp_path: Any) -> None:
    """Each looks at its own layers, and a teacher that nobody looks into keeps nothing."""
    teacher = ModelTeacher(tiny.model(seed=2), V)
    data = tiny.rows(8)
    last = kd(tmp_path, data, tiny.model(seed=1), teacher, attention_weight=1.0, attention_layers="last_1")
    alone, _ = loss_and_gradient(last, micro_batches(last, 8))
    kd(tmp_path, data, tiny.model(seed=1), teacher, attention_weight=1.0)
    again, _ = loss_and_gradient(last, micro_batches(last, 8))
    assert again == alone
    plain = kd(tmp_path, data, tiny.model(seed=1), teacher)
    batch = plain.data_collator([plain.train_dataset[0]])
    assert teacher.outputs(as_batch(batch))[0].features is None


def test_some_layers_checkpointed(tmp_path: Any) -> None:
    results = []
    for layers in ({0, 1}, {1}, set()):
        trainer = kd(tmp_path, tiny.rows(8), tiny.model(seed=1), tiny.model(seed=2), attention_weight=1.0, hidden_weight=1.0)
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(trainer.model.model.layers):
            layer.gradient_checkpointing = index in layers
        assert checkpointed_layers(trainer.model) == layers
        with trainer.until_backward():
            results.append(loss_and_gradient(trainer, micro_batches(trainer, 8)))
    (loss, gradient), *others = results
    for other, too in others:
        assert other == pytest.approx(loss, rel=1e-6) and relative(too, gradient) < 1e-6


def test_a_checkpointed_layer_does_each_half_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    halves: list[tuple[bool, bool]] = []

    def counted(student: Any, teacher: Any, pairs: Any, offsets: Any, value: Any, gradients: Any) -> None:
        halves.append((value is not None, gradients is not None))
        attention_kl_(student, teacher, pairs, offsets, value, gradients)

    monkeypatch.setattr("daekit.losses.attention.attention_kl_", counted)
    trainer = kd(tmp_path, tiny.rows(8), tiny.model(seed=1), tiny.model(seed=2), attention_weight=1.0)
    with trainer.until_backward():
        loss_and_gradient(trainer, micro_batches(trainer, 8))
    assert halves == [(True, True)] * 2
    halves.clear()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    with trainer.until_backward():
        loss_and_gradient(trainer, micro_batches(trainer, 8))
    assert halves == [(True, False)] * 2 + [(False, True)] * 2


def test_lora_dae_with_projections_resumes(tmp_path: Any) -> None:
    """The projections live in the model whose base the reference is a fingerprint of, and change."""

    def trainer() -> DAETrainer:
        changes = HIDDEN | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
        return dae(tmp_path, tiny.rows(16), tiny.model(seed=1), reference=None, peft_config=lora(), **changes)

    straight = trainer()
    assert straight.features.projections is not None
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(straight.model))


def test_the_best_model_comes_with_its_projections(tmp_path: Any) -> None:
    """The highest loss counts as the best, so that it is not the last one."""
    data = tiny.rows(16)
    trainer = kd(
        tmp_path, data, tiny.model(seed=1), tiny.model(seed=2, hidden=48), eval_dataset=data, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, greater_is_better=True,
        max_steps=3, learning_rate=0.5, **HIDDEN,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses.index(max(losses)) < 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


def test_projections_do_not_outlive_their_trainer(tmp_path: Any) -> None:
    student = tiny.model(seed=1)
    first = kd(tmp_path, tiny.rows(8), student, tiny.model(seed=2, hidden=48), **HIDDEN)
    assert any("projections" in name for name, _ in first.model.named_parameters())
    second = dae(tmp_path, tiny.rows(8), first.model, reference=None)
    assert not any("projections" in name for name, _ in second.model.named_parameters())
    reference = second.teacher.routes["general"].model
    assert not any("projections" in name for name, _ in reference.named_parameters())


def test_an_optimizer_without_the_projections_is_refused(tmp_path: Any) -> None:
    student = tiny.model(seed=1)
    with pytest.raises(UserError, match="optimizers: an optimizer of your own"):
        KDTrainer(
            student, tiny.model(seed=2, hidden=48), KDConfig(**options(tmp_path, **HIDDEN)), tiny.rows(4), tiny.tokenizer(),
            optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None),
        )  # fmt: skip


def test_selective_checkpointing_is_refused() -> None:
    with pytest.raises(UserError, match="selective"):
        KDConfig(
            "unused", use_cpu=True, attention_weight=1.0, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"selective": True},
        )  # fmt: skip


# ---- what cannot be done -----------------------------------------------------------------------------------------------


def test_an_ensemble_has_no_attention(tmp_path: Any) -> None:
    members = [ModelTeacher(tiny.model(seed=seed), V) for seed in (2, 3)]
    with pytest.raises(UserError, match="an ensemble has no attention"):
        kd(tmp_path, tiny.rows(4), teacher=EnsembleTeacher(members), attention_weight=1.0)


class Blind:
    """A teacher of the user's own without features."""

    def __init__(self) -> None:
        self.inner = ModelTeacher(tiny.model(seed=2), V)

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        return self.inner.outputs(batch)

    def identity(self) -> dict[str, object]:
        return {}

    def to(self, device: torch.device) -> Blind:
        return self


def test_a_teacher_without_features(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="Blind hands out no features"):
        kd(tmp_path, tiny.rows(4), teacher=Blind(), attention_weight=1.0)


def test_reentrant_checkpointing_is_refused(tmp_path: Any) -> None:
    trainer = kd(
        tmp_path, tiny.rows(4), attention_weight=1.0, max_steps=1, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(UserError, match="use_reentrant"):
        trainer.train()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_eager_attention_is_refused(tmp_path: Any) -> None:
    student = tiny.model(seed=1)
    student.set_attn_implementation("eager")
    for pair in ((student, tiny.model(seed=2)), (tiny.model(seed=2), student)):
        with pytest.raises(UserError, match=r"attn_implementation sdpa or flash attention, not 'eager'"):
            kd(tmp_path, tiny.rows(4), *pair, attention_weight=1.0)


def test_a_window_narrower_than_the_teachers(tmp_path: Any) -> None:
    student, teacher = tiny.model(seed=1, sliding_window=3), tiny.model(seed=2, sliding_window=None)
    trainer = kd(tmp_path, tiny.rows(4), student, teacher, attention_weight=1.0, max_steps=1)
    with pytest.raises(UserError, match="window of 3 tokens hides keys"):
        trainer.train()
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
