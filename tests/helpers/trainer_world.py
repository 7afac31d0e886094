"""What the tests of the trainers share: quick configs, and the loss once more, in float64 and with full logits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from daekit.models.teacher_view import TOKEN_COLUMNS
from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer, KDConfig, KDTrainer
from tests import reference
from tests.helpers import tiny

V = len(tiny.WORDS)
gc.freeze()  # every train() collects garbage: without this it walks through all imported modules, 0.5 s each time


def options(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments of a quick and plain run: SGD on the CPU, nothing written unless asked for."""
    return (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_length=64,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
            num_train_epochs=1,
        )
        | changes
    )


def sft(folder: Path | str, data: Any, student: nn.Module | str | None = None, **changes: Any) -> DomainSFTTrainer:
    """A DomainSFTTrainer on a tiny student."""
    arguments = {key: changes.pop(key) for key in ("eval_dataset", "peft_config", "quantization_config") if key in changes}
    return DomainSFTTrainer(
        model=student if student is not None else tiny.model(seed=1),
        args=DomainSFTConfig(**options(folder, **changes)),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def kd(folder: Path | str, data: Any, student: nn.Module | None = None, teacher: Any = None, **changes: Any) -> KDTrainer:
    """A KDTrainer on a tiny student and teacher."""
    arguments = {
        key: changes.pop(key) for key in ("eval_dataset", "peft_config", "callbacks", "compute_metrics") if key in changes
    }
    return KDTrainer(
        model=student if student is not None else tiny.model(seed=1),
        teacher=teacher if teacher is not None else tiny.model(seed=2, hidden=48),
        args=KDConfig(**options(folder, **changes)),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def dae(folder: Path | str, data: Any, student: nn.Module | None = None, **changes: Any) -> DAETrainer:
    """A DAETrainer with an expert for ``shop`` and a reference that is another model, unless given (None: the student)."""
    arguments = {
        key: changes.pop(key) for key in ("eval_dataset", "peft_config", "callbacks", "reference", "teachers") if key in changes
    }
    arguments.setdefault("teachers", {"shop": tiny.model(seed=3, hidden=48)})
    arguments.setdefault("reference", tiny.model(seed=4))
    return DAETrainer(
        model=student if student is not None else tiny.model(seed=1),
        args=DAEConfig(**options(folder, **changes)),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def in_float64(model: nn.Module) -> nn.Module:
    """An independent copy of a dense model in float64, with nothing that a trainer has hung on it."""
    twin = type(model)(copy.deepcopy(model.config)).double().eval()
    twin.set_experts_implementation("eager")  # grouped matrix products know no float64
    twin.load_state_dict(model.state_dict())
    return twin


@dataclass
class Totals:
    """Sums over the kept tokens of one domain."""

    tokens: int = 0
    ce: float = 0.0
    divergence: float = 0.0
    correct: int = 0


@dataclass
class Twin:
    """The formula of DESIGN section 5, row by row, without padding, chunks or packing."""

    student: nn.Module
    teachers: Mapping[str, nn.Module]
    config: DomainSFTConfig

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Totals]]:
        """The loss per kept token over ``rows`` (``input_ids``, ``labels``, ``domain``), and the sums per domain."""
        loss, totals = torch.zeros((), dtype=torch.float64), {}
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept = labels != -100
            student = self.student(input_ids=ids).logits[0, :-1, :V][kept]
            seen, theirs = ids, kept
            if row.get("teacher_prompt_ids"):
                told = reference.seen_by_teacher(row["input_ids"], row["labels"], row["teacher_prompt_ids"])
                seen, theirs = torch.tensor([told[0]]), torch.tensor(told[1])[1:] != -100
            with torch.no_grad():
                teacher = self.teachers[row["domain"]](input_ids=seen).logits[0, :-1, :V][theirs]
            ce = nn.functional.cross_entropy(student, labels[kept], reduction="none")
            divergence = self.divergence(student, teacher)
            loss = loss + self.config.ce_weight * ce.sum() + self.config.prediction_weight * divergence.sum()
            entry = totals.setdefault(row["domain"], Totals())
            entry.tokens += int(kept.sum())
            entry.ce += ce.sum().item()
            entry.divergence += divergence.sum().item()
            entry.correct += int((student.argmax(-1) == labels[kept]).sum())
        return loss / max(sum(entry.tokens for entry in totals.values()), 1), totals

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``T^2 * D`` per position."""
        temperature, beta, a = self.config.temperature, self.config.beta, self.config.skew_alpha
        s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        m = beta * t + (1 - beta) * s

        def kl(p: Tensor, q: Tensor) -> Tensor:
            return (p * (p.log() - q.log())).sum(-1)

        value = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m)}
        value |= {"skew_kl": kl(t, a * t + (1 - a) * s), "skew_reverse_kl": kl(s, (1 - a) * t + a * s)}
        if self.config.divergence == "tv":
            return (t - s).abs().sum(-1) / 2
        return temperature**2 * value[self.config.divergence]


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model in one float64 vector, in the order of the names; a parameter without one counts as zeros."""
    named = sorted(model.named_parameters())
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for _, p in named])


def weights(model: nn.Module) -> Tensor:
    """All trainable parameters of a model in one float64 vector."""
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])


def relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``."""
    return float((a - b).norm() / b.norm())


def logged(trainer: Any, key: str) -> list[float]:
    """The values of a key in the order in which they were logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def micro_batches(trainer: Any, size: int) -> list[dict[str, Any]]:
    """The training rows in order, collated ``size`` at a time."""
    data = trainer.train_dataset
    columns = [name for name in TOKEN_COLUMNS if name in data.column_names]
    examples = [{name: row[name] for name in columns} for row in data]
    return [trainer.data_collator(copy.deepcopy(examples[i : i + size])) for i in range(0, len(examples), size)]


def loss_and_gradient(trainer: Any, batches: list[dict[str, Any]]) -> tuple[float, Tensor]:
    """Through compute_loss and backward, with the Trainer's own count of tokens over all micro-batches."""
    model = trainer.model.train()
    model.zero_grad()
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(model, batch, num_items_in_batch=items)
        part.backward()
        loss += part.item()
    return loss, gradients(model)


LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**(LORA | changes))


def mixed_rows() -> Any:
    return tiny.rows(8, domains=("general", "shop"))


def kl_of(trainer: Any, domain: str) -> float:
    metrics = trainer.evaluate(mixed_rows())
    return metrics[f"eval_kl/{domain}"]


def four_bit(folder: Path) -> Any:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
