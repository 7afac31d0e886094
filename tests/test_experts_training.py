"""Training with quantised experts: a QLoRA student that is a mixture, and an offloaded 4-bit mixture as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from daekit.errors import UserError
from daekit.models.experts import QuantisedExperts
from daekit.models.identity import fingerprint
from daekit.models.loading import load_model
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from tests.helpers import tiny
from tests.helpers.trainer_world import dae, kd, kl_of, logged, lora, mixed_rows, weights

V = len(tiny.WORDS)
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixtral")
    tiny.model("mixtral", seed=1, hidden=64).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def four_bit(path: str, **fields: Any) -> Any:
    return load_model(ModelSpec(path=path, quantization="4bit", dtype="float32", **fields))


def test_a_qlora_mixture_trains_and_its_reference_is_itself_also_after_a_resume(mixtral: str, tmp_path: Path) -> None:
    """With gradient checkpointing; the base stays as it is, and the checkpoint holds the adapter only."""

    def trainer() -> Any:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_train_epochs": 9, "optim": "adamw_torch"}
        options |= {"learning_rate": 0.01, "gradient_checkpointing": True, "peft_config": lora(target_modules=ATTENTION)}
        return dae(tmp_path / "run", mixed_rows(), four_bit(mixtral), reference=None, **options)

    def base(model: Any) -> list[str]:
        return [fingerprint(module) for module in model.modules() if isinstance(module, QuantisedExperts)]

    straight = trainer()
    before = base(straight.model)
    assert len(before) == 4
    # the reference runs without the rows of other domains, so an expert has other tokens beside it, which may round otherwise
    assert kl_of(straight, "general") == pytest.approx(0.0, abs=1e-7)
    straight.train()
    final = weights(straight.model)
    assert base(straight.model) == before and kl_of(straight, "general") > 1e-5
    assert not list((tmp_path / "run" / "checkpoint-2").rglob("model.safetensors"))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), final)


def test_an_offloaded_four_bit_mixture_teaches_as_a_whole_one(mixtral: str, tmp_path: Path) -> None:
    """Both losses that look inside, too."""
    losses = []
    for offload in (False, True):
        teacher = ModelTeacher(four_bit(mixtral, offload=offload), V, offload=offload)
        inside = {"attention_weight": 0.5, "hidden_weight": 0.3, "max_steps": 3, "learning_rate": 0.01, "logging_steps": 1}
        trainer = kd(tmp_path / str(offload), mixed_rows(), tiny.model(seed=3, hidden=64), teacher, **inside)
        assert (teacher.layers is not None) == offload
        trainer.train()
        losses.append((logged(trainer, "loss"), weights(trainer.model)))
    assert losses[0][0] == losses[1][0] and len(losses[0][0]) >= 3
    assert torch.equal(losses[0][1], losses[1][1])


def test_a_student_given_by_its_path(mixtral: str, tmp_path: Path) -> None:
    """The user's own bitsandbytes settings quantise its experts, too; an adapter on them is refused."""
    settings: dict[str, Any] = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    options = {"model_init_kwargs": {"quantization_config": config}}
    trainer = dae(tmp_path / "a", mixed_rows(), mixtral, reference=None, peft_config=lora(target_modules=ATTENTION), **options)
    assert sum(isinstance(module, QuantisedExperts) for module in trainer.model.modules()) == 4
    with pytest.raises(UserError, match="'w1' names experts"):
        bad = lora(target_modules=["w1", "w3"])
        dae(tmp_path / "b", mixed_rows(), mixtral, reference=None, peft_config=bad, **options)
