"""Everything else of SFTTrainer goes on working; and which private names of TRL and transformers that hangs on."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from trl.models import utils as trl_models
from trl.trainer import sft_trainer

from daekit.models.restore import restore_weights
from daekit.trainers import DomainSFTTrainer
from tests.helpers import tiny
from tests.helpers.trainer_world import Twin, dae, in_float64, kd, logged, options, weights


def test_trl_private_names() -> None:
    """When a new version of TRL or transformers moves something, this says what, before anything fails in the dark."""
    lost = []
    for owner, names in {
        trl.SFTTrainer: ["_prepare_dataset", "_set_signature_columns_if_needed", "_save_checkpoint", "create_model_card"],
        transformers.Trainer: [
            "_run_epoch",
            "_save",
            "_save_checkpoint",
            "_save_rng_state",
            "_save_optimizer_and_scheduler",
            "_prepare_for_training",
            "_load_optimizer_and_scheduler",
            "_load_from_checkpoint",
            "_load_best_model",
            "_get_output_dir",
            "_finalize_training",
            "get_tp_size",
            "get_batch_samples",
            "_get_num_items_in_batch",
        ],
        sft_trainer: ["DataCollatorForLanguageModeling", "add_fused_lm_head", "create_model_from_path"],
        transformers.modeling_utils: ["safe_open", "load_state_dict"],  # daekit/models: quantized_loading.py, split_loading.py
        transformers.PreTrainedModel: ["_load_pretrained_model", "named_non_persistent_buffers"],
        transformers.core_model_loading: ["set_param_for_module", "convert_and_load_state_dict_in_model"],
        transformers.quantizers.quantizers_utils: ["get_module_from_name", "should_convert_module"],
        transformers.models.mixtral.modeling_mixtral: ["load_balancing_loss_func"],
        trl.chat_template_utils: ["get_training_chat_template", "has_generation_markers"],
        trl.data_utils: ["maybe_convert_to_chatml"],
        trl_models: ["unwrap_model_for_generation"],
    }.items():
        lost += [f"{owner.__name__}.{name} is gone" for name in names if not hasattr(owner, name)]
    arguments = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    if list(inspect.signature(trl.SFTTrainer._prepare_dataset).parameters) != arguments:
        lost.append("SFTTrainer._prepare_dataset takes other arguments: KDTrainer overrides and calls it")
    source = {
        transformers.Trainer: [
            "self._tr_loss",
            "self._total_loss_scalar",
            "self._globalstep_last_logged",
            "self.model_accepts_loss_kwargs",
            "self._loss_shifts_labels",
            "self.current_gradient_accumulation_steps",
            "on_train_begin",
            "save_total_limit",
        ],
        trl.SFTTrainer: [
            "self.aux_loss_enabled",
            "self.router_aux_loss_coef",
            "self._total_train_tokens",
            "self._metrics",
            "text_config.output_router_logits = ",
        ],
    }
    for owner, names in source.items():
        text = inspect.getsource(owner)
        lost += [
            f"{owner.__name__} no longer uses {name}, which daekit/trainers sets or reads" for name in names if name not in text
        ]
    assert not lost, f"trl {trl.__version__}, transformers {transformers.__version__}: " + "; ".join(lost)


def test_model_card_and_callbacks(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append("kl/shop" if "kl/shop" in logs else "other")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append("saved")

    trainer = dae(tmp_path, tiny.rows(8), save_strategy="steps", save_steps=2, callbacks=[Watch()])
    trainer.train()
    assert seen.count("saved") == 1 and seen.count("kl/shop") == 2
    card = (tmp_path / "README.md").read_text()
    assert "dae" in card and "trl" in card and "DAE" in card
    assert not trainer.args.push_to_hub


def test_evaluate_takes_raw_rows_prepared_rows_and_dicts(tmp_path: Path) -> None:
    data, held_out = tiny.rows(8), tiny.rows(6, seed=3)
    trainer = kd(
        tmp_path, data, eval_dataset={"seen": data, "new": held_out}, eval_strategy="steps", eval_steps=1, packing=True
    )
    trainer.train()
    assert logged(trainer, "eval_seen_kl/shop") and logged(trainer, "eval_new_kl/general")
    raw, prepared = trainer.evaluate(held_out), trainer.evaluate(trainer.eval_dataset["new"])
    both = trainer.evaluate({"a": held_out})
    assert raw["eval_loss"] == pytest.approx(prepared["eval_loss"], rel=1e-5) == pytest.approx(both["eval_a_loss"], rel=1e-5)


def test_compute_metrics_gets_the_logits(tmp_path: Path) -> None:
    data, student, teacher = tiny.rows(7), tiny.model(seed=1), tiny.model(seed=2)
    found: dict[str, float] = {}

    def count(prediction: Any) -> dict[str, float]:
        kept = prediction.label_ids[:, 1:] != -100
        logits = torch.tensor(prediction.predictions[:, :-1][kept])[:, : len(tiny.WORDS)]
        found["ce"] = float(torch.nn.functional.cross_entropy(logits, torch.tensor(prediction.label_ids[:, 1:][kept])))
        return {"tokens_seen": float(np.sum(kept))}

    trainer = kd(tmp_path, data, student, teacher, eval_dataset=data, compute_metrics=count)
    metrics = trainer.evaluate()
    _, totals = Twin(in_float64(student), dict.fromkeys(("shop", "general"), in_float64(teacher)), trainer.args)(
        trainer.train_dataset
    )
    assert metrics["eval_tokens_seen"] == sum(total.tokens for total in totals.values())
    assert metrics["eval_ce"] == pytest.approx(found["ce"], rel=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_best_model_is_loaded_at_the_end_whole(kind: str, tmp_path: Path) -> None:
    """The highest loss is called the best, so that the best checkpoint is the first one and not the last."""
    data = tiny.rows(16)
    trainer = kd(
        tmp_path,
        data,
        tiny.model(kind, seed=1),
        tiny.model(seed=2),
        eval_dataset=data,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        learning_rate=0.5,
        max_steps=3,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = losses.index(max(losses)) + 1
    assert best < 3  # or the test would prove nothing
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    loaded = weights(trainer.model)
    restore_weights(trainer.model, tmp_path / f"checkpoint-{best}")
    assert torch.equal(loaded, weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"remove_unused_columns": False},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"pad_to_multiple_of": 16},
        {"packing": True, "pad_to_multiple_of": 16},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
        {"gradient_checkpointing": True},
        {"shuffle_dataset": True},
        {"eval_packing": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=str,
)
def test_options_of_sft(changes: dict[str, Any], tmp_path: Path) -> None:
    """One epoch of two steps: all kept tokens come by, and nothing but a split block may change their loss."""
    data = tiny.rows(8)
    plain = dae(tmp_path, data, learning_rate=0.0, logging_steps=2)
    plain.train()
    trainer = dae(tmp_path, data, learning_rate=0.0, logging_steps=2, num_train_epochs=1, **changes)
    trainer.train()
    if "packing_strategy" in changes:  # the first token of a piece is predicted by nothing
        assert 0 < sum(logged(trainer, "tokens/shop")) <= sum(logged(plain, "tokens/shop"))
        return
    for key in ("tokens/shop", "tokens/general"):
        assert logged(trainer, key) == logged(plain, key)
    for key in ("kl/shop", "kl/general", "ce"):
        assert logged(trainer, key) == pytest.approx(logged(plain, key), rel=1e-5)


def test_the_name_of_a_run_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = DomainSFTTrainer(tiny.model(), train_dataset=tiny.rows(4), processing_class=tiny.tokenizer())
    assert trainer.args.output_dir == "mistral-domain-SFT"


def test_an_unknown_argument_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="peft_confg"):
        DomainSFTTrainer(tiny.model(), train_dataset=tiny.rows(4), processing_class=tiny.tokenizer(), peft_confg=None)


def test_our_attributes_are_nobody_elses(tmp_path: Path) -> None:
    """The Trainer keeps things of its own in itself (``objective`` during a search of hyperparameters, for one)."""
    plain = trl.SFTTrainer(
        tiny.model(),
        trl.SFTConfig(**options(tmp_path, bf16=False)),
        train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )
    ours = vars(kd(tmp_path, tiny.rows(4), attention_weight=1.0, teacher=tiny.model(seed=2))).keys() - vars(plain).keys()
    assert {"teacher", "loss_objective", "features"} <= ours
    sources = [inspect.getsource(module) for module in (transformers.trainer, sft_trainer, integration_utils)]
    taken = {name for name in ours if any(re.search(rf"(self|trainer)\.{name}\b", source) for source in sources)}
    assert taken <= {"_loss_shifts_labels"}  # set so that the Trainer reads it
