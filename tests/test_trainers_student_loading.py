"""A student given by its path: loaded as TRL loads it, but never in part and never from a pickle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from daekit.errors import UserError
from daekit.trainers import DomainSFTConfig, DomainSFTTrainer
from tests.helpers import tiny
from tests.helpers.trainer_world import dae, kd, options, sft

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model(seed=1, hidden=64).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("trainer", [sft, kd, dae])
@pytest.mark.parametrize("what", ["missing", "mismatched"])
def test_weights_that_do_not_fill_the_student(what: str, trainer: Any, folder: Path) -> None:
    change(folder, lambda w: w.pop(UP) if what == "missing" else w.update({UP: torch.zeros(3, 3)}))
    with pytest.raises(UserError, match=f"does not fill the model: 1 {what} keys such as .*up_proj.*incomplete"):
        trainer(folder / "out", tiny.rows(8), str(folder))


def test_a_student_whose_weights_are_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny.model(seed=1).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"could not be loaded .*whole \*\.safetensors"):
        kd(folder / "out", tiny.rows(4), str(folder))
    with pytest.raises(UserError, match=r"'use_safetensors': False.* is not supported"):
        kd(folder / "out", tiny.rows(4), str(folder), model_init_kwargs={"use_safetensors": False})


@pytest.mark.parametrize("given", [{}, {"dtype": "bfloat16"}, {"dtype": torch.float16}])
def test_the_dtype_is_the_one_that_trl_would_take(given: dict[str, Any], folder: Path, caplog: Any) -> None:
    change(folder, lambda w: w.update({name: value.to(torch.bfloat16) for name, value in w.items()}))
    with caplog.at_level(logging.WARNING):
        trainer = sft(folder / "out", tiny.rows(4), str(folder), model_init_kwargs=dict(given))
    wanted = given.get("dtype", "float32")
    assert trainer.model.dtype == (getattr(torch, wanted) if isinstance(wanted, str) else wanted)
    assert trainer.args.model_init_kwargs == given
    assert "ignored" not in caplog.text


def test_its_tokenizer_lies_beside_it(folder: Path) -> None:
    trainer = DomainSFTTrainer(str(folder), DomainSFTConfig(**options(folder / "out")), tiny.rows(4))
    assert trainer.processing_class.get_vocab() == tiny.tokenizer().get_vocab()
    trainer.train()


def test_quantization_is_asked_for_once(folder: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = sft(folder / "out", tiny.rows(4), str(folder), quantization_config=config, peft_config=adapter)
    assert trainer.model.base_model.model.is_loaded_in_8bit
    twice = {"quantization_config": config}
    with pytest.raises(UserError, match="given twice"):
        sft(folder / "out", tiny.rows(4), str(folder), quantization_config=config, model_init_kwargs=twice)
