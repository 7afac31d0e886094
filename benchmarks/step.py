"""A whole step of distillation (teacher forward, student forward, loss, backward) on models built from configs.

    python benchmarks/step.py                                # CPU, float32, prediction loss
    python benchmarks/step.py --attention-weight 1           # prediction and attention loss
    python benchmarks/step.py --device cuda                  # about a billion parameters each, bfloat16

Contestants: ours (``KDTrainer.training_step``); materialised (the same objective on plain transformers models: whole logits
and, with the attention loss, the attention maps of all layers that ``attn_implementation="eager"`` returns); sft (TRL's
``SFTTrainer.training_step`` of the same student: what training without a teacher costs). Random weights, one row of T tokens
whose second half is kept. No optimizer step.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from harness import OURS, Case, Unavailable, main
from measure import Outcome, Work
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from daekit.errors import UserError
from daekit.trainers import KDConfig, KDTrainer

SCRATCH = tempfile.TemporaryDirectory(prefix="daekit-benchmark-")  # trainers make their output directory; gone at exit


@dataclass(frozen=True)
class Shape:
    """Sizes and objective of one case; letters as in the legend of ``daekit/protocol.py``."""

    device: torch.device
    dtype: torch.dtype
    attention_weight: float
    T: int = 2048
    V: int = 32_000
    A: int = 8
    G: int = 2
    layers: int = 6
    student_H: int = 512
    teacher_H: int = 768
    checkpointing: bool = False

    @property
    def kept(self) -> int:
        """Kept positions: they predict the tokens of the second half."""
        return self.T // 2


def model(shape: Shape, hidden: int, seed: int, attention: str) -> PreTrainedModel:
    """A random Mistral whose distributions and attention are not flat."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=shape.V,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.A,
        num_key_value_heads=shape.G,
        max_position_embeddings=shape.T,
        sliding_window=None,
        initializer_range=1.5 / hidden**0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=shape.dtype, attn_implementation=attention).to(shape.device)


def student(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """The student, in training mode, with gradient checkpointing where the case has it."""
    made = model(shape, shape.student_H, 0, attention).train()
    if shape.checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def teacher(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """The teacher, frozen."""
    return model(shape, shape.teacher_H, 1, attention).eval().requires_grad_(False)


def row(shape: Shape) -> dict[str, Any]:
    """Random tokens; the second half is the response."""
    ids = torch.randint(2, shape.V, (shape.T,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = shape.T - shape.kept
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "domain": "general"}


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """V words; the trainers ask for one, no text is tokenised."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.V)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2")


def with_gradients(loss: Tensor, trained: PreTrainedModel) -> Outcome:
    """The gradients are taken away from the parameters, so that the next call begins as this one did."""
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    trained.zero_grad(set_to_none=True)
    return loss.detach(), gradients


# ---- contestants ------------------------------------------------------------------------------------------------------


def options_of(shape: Shape) -> dict[str, Any]:
    """What both trainers are given."""
    return dict(
        output_dir=SCRATCH.name,
        per_device_train_batch_size=1,
        max_length=shape.T,
        gradient_checkpointing=shape.checkpointing,
        use_cpu=shape.device.type == "cpu",
        bf16=False,  # the weights themselves have the dtype of the benchmark
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def ours(shape: Shape) -> Work:
    """daekit's KDTrainer."""
    try:
        config = KDConfig(**options_of(shape), attention_weight=shape.attention_weight)
    except UserError as error:
        raise Unavailable(str(error)) from error
    data = Dataset.from_list([row(shape)])
    trainer = KDTrainer(
        model=student(shape),
        teacher=teacher(shape),
        args=config,
        train_dataset=data,
        processing_class=tokenizer(shape),
    )
    return trainer_step(trainer, shape)


def sft(shape: Shape) -> Work:
    """TRL's SFTTrainer, another objective: a yardstick."""
    data = Dataset.from_list([row(shape)]).remove_columns("domain")
    trainer = SFTTrainer(
        model=student(shape),
        args=SFTConfig(**options_of(shape)),
        train_dataset=data,
        processing_class=tokenizer(shape),
    )
    step = trainer_step(trainer, shape)

    def work() -> Outcome:
        step()
        return None, ()

    return work


def trainer_step(trainer: SFTTrainer, shape: Shape) -> Work:
    """One ``training_step`` on the only batch of its data."""
    batch = next(iter(trainer.get_train_dataloader()))
    kept = torch.tensor(shape.kept, device=shape.device)

    def work() -> Outcome:
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=kept)
        return with_gradients(loss, trainer.model)

    return work


def materialised(shape: Shape) -> Work:
    """Plain transformers models, everything in memory at once."""
    attention = "eager" if shape.attention_weight else "sdpa"
    mine, theirs = student(shape, attention), teacher(shape, attention)
    example = row(shape)
    ids, labels = (torch.tensor([example[key]], device=shape.device) for key in ("input_ids", "labels"))
    inputs = dict(input_ids=ids, use_cache=False, output_attentions=bool(shape.attention_weight))
    kept = labels[0, 1:] != -100

    def work() -> Outcome:
        with torch.no_grad():
            t = theirs(**inputs)
        s = mine(**inputs)
        s_log, t_log = (out.logits[0, :-1][kept].float().log_softmax(-1) for out in (s, t))
        loss = (t_log.exp() * (t_log - s_log)).sum()
        if shape.attention_weight:
            loss = loss + shape.attention_weight * map_loss(s.attentions, t.attentions, kept)
        loss = loss / shape.kept
        loss.backward()
        return with_gradients(loss, mine)

    return work


def map_loss(student_maps: tuple[Tensor, ...], teacher_maps: tuple[Tensor, ...], kept: Tensor) -> Tensor:
    """``sum t (log t - log s)`` over the kept rows of all maps, divided by heads x layers."""
    tiny = torch.finfo(torch.float32).tiny  # of masked entries: 0 log 0 would be NaN
    total = torch.zeros((), device=kept.device)
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        s, t = (each[0, :, :-1][:, kept].float() for each in (student_map, teacher_map))
        total = total + (t * ((t + tiny).log() - (s + tiny).log())).sum()
    return total / (student_maps[0].shape[1] * len(student_maps))


# ---- cases ------------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases of a device, each with and without gradient checkpointing."""
    base = Shape(options.device, options.dtype, options.attention_weight)
    if options.small:
        sizes = [replace(base, T=64, V=500, layers=2, student_H=64, teacher_H=96)]
    elif options.device.type == "cuda":
        large = replace(base, V=128_256, A=32, G=8, layers=16, student_H=2048, teacher_H=3072)
        sizes = [replace(large, T=T) for T in (4096, 2048)]
    else:
        # the narrower the models, the more of the step is the losses'
        sizes = [base, replace(base, student_H=256, teacher_H=384)]
    tolerance = 1e-3 if options.dtype == torch.float32 else 5e-2
    makers = {OURS: ours, "materialised": materialised, "sft": sft}

    def case(shape: Shape) -> Case:
        losses = "prediction+attention" if shape.attention_weight else "prediction"
        name = f"{losses} T={shape.T} H={shape.student_H}{' checkpointing' if shape.checkpointing else ''}"
        return Case(name, {who: functools.partial(make, shape) for who, make in makers.items()}, tolerance)

    return [case(replace(size, checkpointing=checkpointing)) for size in sizes for checkpointing in (False, True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The weight of the attention loss, of ours and of the materialised step."""
    parser.add_argument("--attention-weight", type=float, default=0.0)


if __name__ == "__main__":
    main(__doc__, cases, add_arguments)
