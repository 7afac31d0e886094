"""A step of DAE with both frozen models read from caches, beside DAE with live ones and SFT of the same student.

    python benchmarks/cache.py --json benchmarks/results/cache-cpu.json
    python benchmarks/cache.py --model DIR                # expert, reference and student are this model

Contestants: ours (``DAETrainer``, expert and reference cached, ``keep: hidden``); live (the same, both loaded); top_k (K = 64,
another objective: a yardstick); sft-daekit (``DomainSFTTrainer``) and sft (TRL's) of the same student: what training without
teachers costs. Two rows of T tokens whose second halves carry loss, one per domain; no optimizer step. ``--write`` prints the
bytes per loss token of each kind of cache, and the seconds of writing beside those of the teacher's forward alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import step
import torch
from datasets import Dataset
from harness import OURS, Case, main
from measure import Outcome, Work
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from daekit.models.vocabulary import vocabulary_size
from daekit.teachers import CachedTeacher, ModelTeacher, write_cache
from daekit.teachers.cache.asking import padded_batch
from daekit.teachers.cache.rows import rows_of_examples
from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer

DOMAINS = ("shop", "general")


@dataclass(frozen=True)
class Shape(step.Shape):
    """Sizes of one case; a directory takes the place of the random models."""

    path: str | None = None


def tokenizer(shape: Shape) -> Any:
    """That of the model, or V words."""
    return AutoTokenizer.from_pretrained(shape.path) if shape.path else step.tokenizer(shape)


def load(shape: Shape, hidden: int, seed: int) -> Any:
    """A model of the case."""
    if shape.path is None:
        return step.model(shape, hidden, seed, "sdpa")
    return AutoModelForCausalLM.from_pretrained(shape.path, dtype=shape.dtype).to(shape.device)


def data(shape: Shape, rows: int = 2) -> Dataset:
    """Random tokens; the second half of each row is the response."""
    vocab = vocabulary_size(tokenizer(shape))
    ids = torch.randint(2, vocab, (rows, shape.T), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = [-100] * (shape.T - shape.kept)
    made = [
        {"input_ids": row, "labels": prompt + row[shape.T - shape.kept :], "domain": DOMAINS[number % 2]}
        for number, row in enumerate(ids)
    ]
    return Dataset.from_list(made)


def teacher(shape: Shape, domain: str) -> ModelTeacher:
    """Expert or reference."""
    made = load(shape, shape.teacher_H, 1 + DOMAINS.index(domain))
    return ModelTeacher(made, vocabulary_size(tokenizer(shape)), domain).to(shape.device)


def options_of(shape: Shape) -> dict[str, Any]:
    """What all trainers are given."""
    return step.options_of(shape) | {"per_device_train_batch_size": 2}


def dae(shape: Shape, how: dict[str, Any] | None) -> Work:
    """DAE with live teachers, or with caches of this kind, written here and forgotten."""
    rows = data(shape)
    teachers: dict[str, ModelTeacher | CachedTeacher] = {}
    for domain in DOMAINS:
        live = teacher(shape, domain)
        if how is None:
            teachers[domain] = live
            continue
        folder = tempfile.mkdtemp(dir=step.SCRATCH.name)
        mine = [row for row in rows if row["domain"] == domain]
        write_cache(live, mine, folder, tokenizer=tokenizer(shape), device=shape.device, **how)
        teachers[domain] = CachedTeacher(folder)
        del live
    trainer = DAETrainer(
        load(shape, shape.student_H, 0).train(),
        {"shop": teachers["shop"]},
        teachers["general"],
        DAEConfig(**options_of(shape)),
        rows,
        tokenizer(shape),
    )
    return work_of(trainer, shape)


def sft(shape: Shape, ours: bool) -> Work:
    """SFT, daekit's or TRL's: another objective."""
    student, rows = load(shape, shape.student_H, 0).train(), data(shape)
    if ours:
        trainer: Any = DomainSFTTrainer(student, DomainSFTConfig(**options_of(shape)), rows, processing_class=tokenizer(shape))
    else:
        args = SFTConfig(**options_of(shape))
        trainer = SFTTrainer(
            model=student, args=args, train_dataset=rows.remove_columns("domain"), processing_class=tokenizer(shape)
        )
    return yardstick(work_of(trainer, shape))


def work_of(trainer: Any, shape: Shape) -> Work:
    """One ``training_step`` on the only batch of its data."""
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = torch.tensor(2 * shape.kept, device=shape.device)

    def work() -> Outcome:
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=tokens)
        return step.with_gradients(loss, trainer.model)

    return work


def yardstick(work: Work) -> Work:
    """The same work, whose result is not compared."""

    def alone() -> Outcome:
        work()
        return None, ()

    return alone


def write_speed(shape: Shape, rows: int = 8) -> None:
    """Print bytes per loss token, and seconds of writing beside those of the forward alone; one line of JSON per kind."""
    live, examples = teacher(shape, "shop"), list(data(shape, rows))
    batches = [padded_batch(list(rows_of_examples(examples[i : i + 2])), shape.T, shape.device) for i in range(0, rows, 2)]
    live.outputs(batches[0])
    for how in ({"keep": "hidden"}, {"keep": "top_k", "k": 64}, {"keep": "sampled", "draws": 50}):
        start = time.perf_counter()
        for batch in batches:
            live.outputs(batch)
        forward = time.perf_counter() - start
        folder = Path(tempfile.mkdtemp(dir=step.SCRATCH.name))
        start = time.perf_counter()
        write_cache(live, examples, folder, device=shape.device, batch_tokens=2 * shape.T, **how)  # type: ignore[arg-type]
        seconds, store = time.perf_counter() - start, CachedTeacher(folder).store
        shards = sum(shard.bytes for shard in store.shards)
        facts = {"tokens": store.tokens, "bytes_per_token": shards / store.tokens, "heads_mb": (store.size - shards) / 1e6}
        print(json.dumps(how | facts | {"seconds": seconds, "forward_seconds": forward}), flush=True)


def shapes(options: argparse.Namespace) -> list[Shape]:
    """The sizes of a device."""
    base = Shape(options.device, options.dtype, 0.0, T=512, teacher_H=512)
    if options.small:
        return [replace(base, T=64, V=500, layers=2, student_H=64, teacher_H=96)]
    return [replace(base, path=options.model)] if options.model else [base, replace(base, student_H=256, teacher_H=768)]


def cases(options: argparse.Namespace) -> list[Case]:
    """One case per shape."""
    makers: dict[str, Any] = {
        OURS: functools.partial(dae, how={"keep": "hidden"}),
        "live": functools.partial(dae, how=None),
        "top_k": lambda shape: yardstick(dae(shape, {"keep": "top_k", "k": 64})),
        "sft-daekit": functools.partial(sft, ours=True),
        "sft": functools.partial(sft, ours=False),
    }

    def case(shape: Shape) -> Case:
        name = f"dae T={shape.T} {Path(shape.path).name if shape.path else f'H={shape.student_H} teachers={shape.teacher_H}'}"
        return Case(name, {who: functools.partial(make, shape) for who, make in makers.items()}, 1e-5)

    if options.write and not options.run:
        for shape in shapes(options):
            write_speed(shape)
        sys.exit(0)
    return [case(shape) for shape in shapes(options)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models."""
    parser.add_argument("--model", metavar="DIR", help="expert, reference and student instead of random models")
    parser.add_argument("--write", action="store_true", help="measure the writing instead")


if __name__ == "__main__":
    main(__doc__, cases, add_arguments)
