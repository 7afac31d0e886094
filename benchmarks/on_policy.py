"""Steps of on-policy distillation: the student writes every response, the teacher scores it, forward and backward.

    python benchmarks/on_policy.py                      # CPU, float32
    python benchmarks/on_policy.py --device cuda        # bfloat16

Contestants: ours (``KDTrainer`` with a buffer of all the steps), one-by-one (the same with one response at a time), trl-gkd
(``trl.experimental.gkd.GKDTrainer``, which writes the responses of each micro-batch for itself and makes whole logits), and as
a yardstick off-policy (ours on rows with responses of the same length: what is left without generation). All write the most
likely token, so that they must find the same loss and gradient. Random weights that end no response; no optimizer step.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from harness import OURS, Case, main
from measure import Outcome, Work
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from daekit.trainers import KDConfig, KDTrainer, rollouts

SCRATCH = tempfile.TemporaryDirectory(prefix="daekit-benchmark-")  # trainers make their output directory; gone at exit


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    device: torch.device
    dtype: torch.dtype
    vocabulary: int = 49_152
    steps: int = 4
    rows: int = 8  # of a step
    prompt: int = 64  # tokens at most
    response: int = 32
    student_width: int = 576
    teacher_width: int = 768
    layers: int = 6


def model(shape: Shape, width: int, seed: int) -> PreTrainedModel:
    """A random Llama with tied embeddings, as SmolLM2 is."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=width // 64 or 1,
        num_key_value_heads=max(1, width // 192),
        max_position_embeddings=shape.prompt + shape.response,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=shape.dtype).to(shape.device)


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """As many words as the vocabulary has; the trainers ask for one, no text is tokenised."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocabulary)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2")


def rows(shape: Shape) -> list[dict[str, Any]]:
    """Random prompts of unequal lengths, and responses as long as those that will be written."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(shape.steps * shape.rows):
        prompt = shape.prompt - (5 * number) % (shape.prompt // 2)
        ids = [*torch.randint(2, shape.vocabulary, (prompt + shape.response - 1,), generator=generator).tolist(), 1]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "domain": "general"})
    return made


def options_of(shape: Shape) -> dict[str, Any]:
    """What all trainers are given."""
    return dict(
        output_dir=SCRATCH.name,
        per_device_train_batch_size=shape.rows,
        max_length=shape.prompt + shape.response,
        gradient_checkpointing=False,
        use_cpu=shape.device.type == "cpu",
        bf16=False,  # the weights themselves have the dtype of the benchmark
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )


def ours(shape: Shape, together: int | None = None, on_policy: float = 1.0) -> Work:
    """daekit's KDTrainer."""
    if together is not None:
        rollouts.ROLLOUT_BATCH = together
    settings: dict[str, Any] = dict(rollout_temperature=0.0, max_new_tokens=shape.response, rollout_buffer=shape.steps)
    trainer = KDTrainer(
        model=model(shape, shape.student_width, 0).train(),
        teacher=model(shape, shape.teacher_width, 1),
        args=KDConfig(**options_of(shape), on_policy_fraction=on_policy, **settings),
        train_dataset=Dataset.from_list(rows(shape)),
        processing_class=tokenizer(shape),
    )
    collated = [
        trainer.data_collator(rows(shape)[at : at + shape.rows]) for at in range(0, shape.steps * shape.rows, shape.rows)
    ]
    trainer.state.max_steps = shape.steps

    def work() -> Outcome:
        if on_policy:
            trainer.rollouts = rollouts.Rollouts(trainer)
        total, epoch = torch.zeros((), device=shape.device), iter(collated)
        for trainer.state.global_step in range(shape.steps):
            [batch], items = trainer.get_batch_samples(epoch, 1, shape.device)
            total += trainer.training_step(trainer.model, batch, num_items_in_batch=items)
        return with_gradients(total, trainer.model) if on_policy else (None, ())

    return work


def gkd(shape: Shape) -> Work:
    """TRL's GKDTrainer, with forward KL."""
    trainer = GKDTrainer(
        model=model(shape, shape.student_width, 0).train(),
        teacher_model=model(shape, shape.teacher_width, 1),
        args=GKDConfig(**options_of(shape), lmbda=1.0, beta=0.0, temperature=1.0, max_new_tokens=shape.response),
        train_dataset=Dataset.from_list(rows(shape)).remove_columns("domain"),
        processing_class=tokenizer(shape),
    )
    trainer.generation_config.do_sample, trainer.generation_config.temperature = False, None
    made = rows(shape)
    tokens = torch.tensor(shape.rows * shape.response, device=shape.device)

    def work() -> Outcome:
        total = torch.zeros((), device=shape.device)
        for step in range(shape.steps):
            batch = made[step * shape.rows : (step + 1) * shape.rows]
            total += trainer.training_step(trainer.model, prompts(batch, shape.device), num_items_in_batch=tokens)
        return with_gradients(total, trainer.model)

    return work


def prompts(batch: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """Prompts as GKD's collator gives them: padded on the left."""
    each = [[id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in batch]
    width = max(map(len, each))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in each], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in each], device=device)
    return {"prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask, "labels": ids}


def with_gradients(loss: Tensor, trained: PreTrainedModel) -> Outcome:
    """The gradients are taken away from the parameters, so that the next call begins as this one did."""
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    trained.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def cases(options: argparse.Namespace) -> list[Case]:
    """One case: four steps of eight rows."""
    shape = Shape(options.device, options.dtype)
    if options.small:
        shape = replace(
            shape, vocabulary=500, steps=2, rows=2, prompt=12, response=6, student_width=64, teacher_width=96, layers=2
        )
    tolerance = 1e-3 if options.dtype == torch.float32 else 5e-2
    makers: dict[str, Callable[[Shape], Work]] = {OURS: ours, "one-by-one": functools.partial(ours, together=1), "trl-gkd": gkd}
    makers["off-policy"] = functools.partial(ours, on_policy=0.0)
    name = f"{shape.steps} steps of {shape.rows} rows, V={shape.vocabulary}"
    return [Case(name, {who: functools.partial(make, shape) for who, make in makers.items()}, tolerance)]


if __name__ == "__main__":
    main(__doc__, cases)
