"""One rank of a test of DDP: trains the cases it is given and writes weights and logs; and the same with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel

from daekit.models.loading import load_model
from daekit.recipe.schema import ModelSpec
from daekit.teachers import EnsembleTeacher, ModelTeacher, RoutedTeacher
from daekit.trainers import data as trainer_data
from tests.helpers import tiny
from tests.helpers.trainer_world import V, dae, kd, relative, weights

SAME = 1e-5  # what rounding may do
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),  # this file is a program of the ranks, too: it imports `tests`
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CASES = ["kd", "kd-lora", "kd-one-rank-all-masked", "dae", "dae-one-domain-per-rank", "dae-mixtral", "dae-lora-reference"]
CASES += ["kd-clipped", "kd-lora-checkpointing", "kd-tied-checkpointing", "kd-ensemble-one-domain-per-rank", "dae-reference"]
INSIDE = {"attention_weight": 0.5, "hidden_weight": 0.5}
CASES += [
    "kd-inside-one-rank-all-masked",
    "dae-inside-checkpointing-one-domain-per-rank",
    "dae-inside-checkpointing",
    "dae-inside-lora-reference",
]


ON_POLICY = {"on_policy_fraction": 0.5, "max_new_tokens": 8, "rollout_buffer": 2}
CASES += ["kd-on-policy", "dae-on-policy-lora-reference", "kd-normalize-rows"]
TOLD = ["kd-told", "dae-told", "kd-told-packed", "dae-told-packed", "dae-told-lora-reference"]


def rows(case: str) -> Dataset:
    """Eight rows of unequal lengths, in the order in which rank r gets rows r*2, r*2+1 of every global batch of four."""
    made: list[dict[str, Any]] = []
    for index in range(32 if "packed" in case else 8):
        length = (5, 7)[index // 2 % 2] if "packed" in case else 4 + (index * 7) % 9  # a block of 12 has one row of each
        ids = [3 + (5 * index + step) % 40 for step in range(length)]
        ids += [tiny.WORDS.index("</s>")] if "on-policy" in case else []
        second_rank = index % 4 >= 2
        domain = ("shop", "general")[second_rank if "one-domain-per-rank" in case else index % 2]
        prompt = len(ids) if "one-rank-all-masked" in case and second_rank else 1 + index % 3
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "domain": domain})
        if "told" in case:  # two rows of three have a prompt of its own length for their teacher
            made[-1]["teacher_prompt_ids"] = [3 + (3 * index + step) % 40 for step in range(index % 3 * 4)]
    return Dataset.from_list(made)


def trainer_of(case: str, folder: Path, world: int, **options: Any) -> Any:
    kind = "mixtral" if "mixtral" in case else "mistral"
    changes: dict[str, Any] = dict(
        per_device_train_batch_size=2 if world == 2 else 4,
        gradient_accumulation_steps=2,
        eval_dataset=rows("plain").select(range(7)),
        ce_weight=0.5,
        per_device_eval_batch_size=2,
        num_train_epochs=2,
        logging_steps=1,
    )
    changes["gradient_checkpointing"] = "checkpointing" in case
    if "inside" in case:
        changes |= INSIDE
    if "lora" in case:
        changes["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if "reference" in case:
        changes["reference"] = None
    if "on-policy" in case:
        changes |= ON_POLICY
    if "told" in case:
        changes["eval_dataset"] = rows(case).select(range(7))
    if "packed" in case:
        changes |= dict(packing=True, packing_strategy="bfd", eval_packing=False, max_length=12)
    if "normalize" in case:
        changes["normalize"] = "rows"
    changes |= options
    if "clipped" in case:
        changes["max_grad_norm"] = 0.5
    if "ensemble" in case:
        changes["teacher"] = ensemble()
    student: Any = tiny.model(kind, seed=1, hidden=64 if "8bit-optimizer" in case else 32, tie_word_embeddings="tied" in case)
    if "8bit-optimizer" in case:
        changes |= {"optim": "adamw_bnb_8bit", "learning_rate": 1e-3}
    if "bf16" in case:
        changes["bf16"] = True
    if "whole-teacher" in case:
        changes["teacher"] = ModelTeacher(tiny.model(seed=2, hidden=48), V, whole=True)
    if "4bit-experts" in case:
        changes["teacher"] = four_bits(tiny.model("mixtral", seed=2, hidden=64), folder / case)
    if "4bit-teacher" in case:
        changes["teacher"] = four_bits(tiny.model(seed=2, hidden=64), folder / case)
    if "4bit-student" in case:
        student = four_bits(tiny.model(seed=1, hidden=64), folder / case)
    if "read" in case:
        student, places = str(folder_of(folder) / ("tied" if "tied" in case else "student")), folder_of(folder)
        if "bf16" in case:
            changes["model_init_kwargs"] = {"dtype": "bfloat16"}
        if case.startswith("kd"):
            changes["teacher"] = str(places / ("half" if "half-teacher" in case else "expert"))
        else:
            changes["teachers"] = {"shop": str(places / "expert")}
            changes.setdefault("reference", str(places / "mixture"))
    method = kd if case.startswith("kd") else dae
    return method(folder, rows(case), student, **changes)


def write_models(folder: Path) -> None:
    """Checkpoints of several shards, under the names of the hub, for the cases that read their models."""
    models = {
        "student": tiny.model(seed=1),
        "tied": tiny.model(seed=1, tie_word_embeddings=True),
        "expert": tiny.model(seed=2, hidden=48, tie_word_embeddings=True),
        "mixture": tiny.model("mixtral", seed=4),
        "half": tiny.model(seed=2, hidden=48).bfloat16(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / "models" / name, max_shard_size="20KB")
        tiny.tokenizer().save_pretrained(folder / "models" / name)


def folder_of(folder: Path) -> Path:
    """Where ``write_models`` has put them for a run in ``folder`` or below."""
    return next(place / "models" for place in (folder, *folder.parents) if (place / "models").is_dir())


def four_bits(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model in 4 bits, which it can only be loaded in. Among ranks save_pretrained would write on the first only."""
    place = folder / f"16-bit-{os.environ.get('RANK', '0')}"
    place.mkdir(parents=True, exist_ok=True)
    model.config.to_json_file(place / "config.json")
    save_file(model.state_dict(), place / "model.safetensors", metadata={"format": "pt"})
    return load_model(ModelSpec(path=str(place), quantization="4bit", dtype="float32"))


def ensemble() -> EnsembleTeacher:
    """Two members, one of which has a teacher per domain."""
    one, other, third = (ModelTeacher(tiny.model(seed=seed, hidden=hidden), V) for seed, hidden in ((2, 48), (5, 32), (6, 32)))
    return EnsembleTeacher([RoutedTeacher({"general": one, "shop": other}), third], [0.25, 0.75])


def train(case: str, folder: Path, world: int) -> None:
    """One process of ``world``; every rank writes its weights and its log."""
    with pytest.MonkeyPatch.context() as patch:
        # keep the rows that have nothing to learn, and the order of all
        patch.setattr(trainer_data, "fit_to_length", lambda dataset, *_: (dataset, {}))
        patch.setattr(transformers.Trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
        train_patched(case, folder, world)


def train_patched(case: str, folder: Path, world: int) -> None:
    trainer = trainer_of(case, folder, world)
    assert trainer.accelerator.num_processes == world
    if world > 1:
        assert trainer.accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        assert torch.distributed.get_world_size() == world
    trainer.train()
    metrics = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    rank = trainer.args.process_index
    torch.save(
        {"weights": weights(trainer.model), "history": history, "metrics": metrics}, folder / f"{case}-{world}-{rank}.pt"
    )


RECIPE = """
name: small
output_dir: OUT
tokenizer: {train: {vocab_size: 400, kind: words}}
sources:
  skills: {domain: general, path: "builtin:skills", validation: "builtin:skills", limit: 64, validation_limit: 4}
  shop: {domain: shop, path: "builtin:shop", limit: 64}
stages:
  student:
    type: sft
    student: {config: {model_type: mistral, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1}}
    data: [skills]
    trainer: &trainer {max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, gradient_checkpointing: false,
                       optim: sgd, learning_rate: 0.1}
  aligned: {type: dae, teachers: {shop: "stage:student"}, reference: {stage: student, whole: true},
            data: {shop: 0.5, skills: 0.5}, loss: {ce_weight: 1},
            trainer: *trainer}
evaluation: {models: [aligned], max_new_tokens: 2}
"""


def compare(cases: list[str], folder: Path) -> None:
    subprocess.run([*LAUNCHER, __file__, str(folder), json.dumps(cases)], check=True, env=ENVIRONMENT)
    for case in cases:
        train(case, folder, 1)
        require_same(case, folder)


def require_same(case: str, folder: Path) -> None:
    """What two ranks have written is what one has, and both of them hold the same weights."""
    one, first, second = (torch.load(folder / f"{case}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    start = weights(trainer_of(case, folder, 1).model)
    assert torch.equal(first["weights"], second["weights"]), case
    assert relative(first["weights"] - start, one["weights"] - start) < SAME, case
    assert len(first["history"]) == len(one["history"]) > 1, case
    for ours, theirs in zip(first["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys(), case
        for key in theirs.keys() - {"learning_rate", "epoch", "rollout_rows_per_second"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (case, key)
    for key, value in one["metrics"].items():  # seven rows in batches of two on two ranks: one row is repeated
        if not key.endswith(("runtime", "per_second", "_time")):
            assert first["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (case, key)


if __name__ == "__main__":
    for name in json.loads(sys.argv[2]):
        train(name, Path(sys.argv[1]), 2)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
