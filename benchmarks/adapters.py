"""A step of DAE whose student, expert and reference are adapters of one 4-bit base, beside what it is compared with.

    python benchmarks/adapters.py                 # CPU, about 170 million parameters
    python benchmarks/adapters.py --device cuda   # about a billion

Contestants: ours (``DAETrainer``, ``AdapterPath`` teachers: one base); three-models (the same objective, expert and reference
each on a 4-bit base of its own); three-models-16bit (expert and reference merged into 16-bit models, as ``stage: NAME`` of a
recipe loads them: not quite the same teachers, so a yardstick); sft (TRL's ``SFTTrainer``, QLoRA of the same student: what
training without teachers costs); sft-daekit (the same by daekit's ``DomainSFTTrainer``). Random weights; rows of T tokens whose
second half is kept, half of the rows the expert's. Forward, backward and the optimizer's step. Memory that is held are the
models, memory at peak is what the step adds to it.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import OURS, Case, main
from measure import Outcome, Work
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from daekit.models.adapters import load_continued
from daekit.models.loading import load_model
from daekit.recipe.schema import ModelSpec
from daekit.teachers import AdapterPath, ModelTeacher
from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer

SCRATCH = tempfile.TemporaryDirectory(prefix="daekit-benchmark-")  # base, adapters, output directories; gone at exit


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; letters as in the legend of ``daekit/protocol.py``."""

    device: torch.device
    B: int = 4
    T: int = 256
    V: int = 32_000
    H: int = 1024
    layers: int = 8
    r: int = 16
    checkpointing: bool = True

    @property
    def kept(self) -> int:
        """Kept positions: they predict the tokens of the second halves."""
        return self.B * (self.T // 2)

    @property
    def folder(self) -> Path:
        """Where the models of these sizes lie, made when first asked for: ``base``, ``expert`` and ``start``."""
        folder = Path(SCRATCH.name) / f"{self.H}-{self.layers}-{self.V}"
        if not folder.exists():
            _save_models(self, folder)
        return folder


def _save_models(shape: Shape, folder: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape.V,
        hidden_size=shape.H,
        intermediate_size=4 * shape.H,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=1.5 / shape.H**0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.V)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder / "base"
    )
    for name in ("expert", "start"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        lora = LoraConfig(r=shape.r, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(base, lora, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.1)
        adapted.save_pretrained(folder / name)


def on_base(shape: Shape, adapter: str) -> PeftModel:
    """A 4-bit base with an adapter that is trained on."""
    spec = ModelSpec(
        path=str(shape.folder / "base"), adapter=str(shape.folder / adapter), quantization="4bit", dtype="bfloat16"
    )
    return load_continued(spec).to(shape.device)


def frozen(shape: Shape, adapter: str, quantization: bool) -> ModelTeacher:
    """A teacher that is a model of its own: a 4-bit base with its adapter in bfloat16, or merged in 16 bits."""
    if quantization:
        model: Any = on_base(shape, adapter)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        model = load_model(ModelSpec(path=str(shape.folder / adapter), dtype="bfloat16")).to(shape.device)
    return ModelTeacher(model, shape.V)


def data(shape: Shape) -> Dataset:
    """B rows of random tokens, of the two domains in turn; the second half is the response."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(shape.B):
        ids = torch.randint(2, shape.V, (shape.T,), generator=generator).tolist()
        prompt = shape.T - shape.T // 2
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "domain": ("general", "shop")[index % 2]})
    return Dataset.from_list(rows)


def options_of(shape: Shape) -> dict[str, Any]:
    """What both trainers are given."""
    return dict(
        output_dir=SCRATCH.name,
        per_device_train_batch_size=shape.B,
        max_length=shape.T,
        gradient_checkpointing=shape.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=shape.device.type == "cpu",
        bf16=shape.device.type == "cuda",
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


# ---- contestants ------------------------------------------------------------------------------------------------------


def dae(shape: Shape, expert: Any, reference: Any) -> Work:
    """daekit's DAETrainer."""
    trainer = DAETrainer(
        on_base(shape, "start"), {"shop": expert}, reference, DAEConfig(**options_of(shape)), data(shape), tokenizer(shape)
    )
    return step(trainer, shape)


def ours(shape: Shape) -> Work:
    """All on one base."""
    return dae(shape, AdapterPath(str(shape.folder / "expert")), AdapterPath(str(shape.folder / "start")))


def three_models(shape: Shape, quantization: bool) -> Work:
    """Expert and reference are models of their own."""
    work = dae(shape, frozen(shape, "expert", quantization), frozen(shape, "start", quantization))
    return work if quantization else lambda: _yardstick(work())


def sft(shape: Shape) -> Work:
    """TRL's SFTTrainer: another objective, a yardstick."""
    args = SFTConfig(**options_of(shape))
    rows = data(shape).remove_columns("domain")
    trainer = SFTTrainer(model=on_base(shape, "start"), args=args, train_dataset=rows, processing_class=tokenizer(shape))
    work = step(trainer, shape)
    return lambda: _yardstick(work())


def sft_without_logits(shape: Shape) -> Work:
    """daekit's DomainSFTTrainer, which makes no logits of all positions: what DAE adds to the same loss without teachers."""
    trainer = DomainSFTTrainer(
        on_base(shape, "start"), DomainSFTConfig(**options_of(shape)), data(shape), processing_class=tokenizer(shape)
    )
    work = step(trainer, shape)
    return lambda: _yardstick(work())


def step(trainer: SFTTrainer, shape: Shape) -> Work:
    """A ``training_step`` on the only batch of the data, and the optimizer's step."""
    batch = next(iter(trainer.get_train_dataloader()))
    kept = torch.tensor(shape.kept, device=shape.device)
    if shape.checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = trainer.create_optimizer()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def work() -> Outcome:
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=kept)
        optimizer.step()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradients

    return work


def _yardstick(_: Outcome) -> Outcome:
    return None, ()


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """V words; the trainers ask for one, no text is tokenised."""
    return PreTrainedTokenizerFast.from_pretrained(shape.folder / "base")


# ---- cases ------------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> list[Case]:
    """With and without gradient checkpointing; every contestant first rehearses with small models."""
    base = Shape(options.device)
    small = replace(base, T=32, V=500, H=64, layers=2, r=4)
    if options.small:
        base = small
    elif options.device.type == "cuda":
        base = replace(base, T=2048, V=128_256, H=2048, layers=16)
    makers: dict[str, Callable[[Shape], Work]] = {
        OURS: ours,
        "three-models": functools.partial(three_models, quantization=True),
        "three-models-16bit": functools.partial(three_models, quantization=False),
        "sft": sft,
        "sft-daekit": sft_without_logits,
    }

    def case(shape: Shape) -> Case:
        name = f"QLoRA B={shape.B} T={shape.T} H={shape.H}{' checkpointing' if shape.checkpointing else ''}"
        contestants, rehearsals = (
            {who: functools.partial(make, each) for who, make in makers.items()}
            for each in (shape, replace(small, checkpointing=shape.checkpointing))
        )
        return Case(name, contestants, tolerance=5e-2, rehearsals=rehearsals)

    return [case(replace(base, checkpointing=checkpointing)) for checkpointing in (True, False)]


if __name__ == "__main__":
    main(__doc__, cases)
