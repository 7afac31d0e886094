"""What the tests of suites share: models on the disk, an adapter, and inputs of every likelihood benchmark."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from tests.helpers import tiny


def save(folder: Path, seed: int, template: bool = True) -> Path:
    tiny.model(seed=seed).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def lora(model, folder: Path, seed: int) -> Path:
    """An adapter on ``model`` that changes it."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


def build_world(root: Path) -> Path:
    """Two models, an adapter on the first, inputs for the likelihood benchmarks, and a suite of them."""
    save(root / "one", 0)
    save(root / "two", 1)
    base = tiny.model(seed=0)
    base.name_or_path = base.config._name_or_path = str(root / "one")
    lora(base, root / "adapter", 2)
    rng = random.Random(0)
    (root / "pairs").mkdir()
    for paradigm in range(6):
        lines = [json.dumps({"sentence_good": tiny.words(rng, 2, 6), "sentence_bad": tiny.words(rng, 2, 6)}) for _ in range(8)]
        (root / "pairs" / f"paradigm_{paradigm}.jsonl").write_text("\n".join(lines))
    (root / "text.txt").write_text(tiny.words(rng, 150, 160))
    quiz = [{"question": "w1", "choices": [tiny.words(rng, 1, 3) for _ in range(3)], "answer": 1} for _ in range(10)]
    (root / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz)))
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows(10, seed=1)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = {
        "name": "all",
        "output_dir": str(root / "out"),
        "baseline": "one",
        "bootstrap": 100,
        "batch_size": 4,
        "reference_domains": ["general", "english"],
        "benchmarks": {
            "blimp": {"type": "minimal_pairs", "path": str(root / "pairs")},
            "text": {
                "type": "perplexity",
                "texts": {"english": str(root / "text.txt")},
                "window": 32,
                "stride": 16,
                "block": 50,
            },
            "quiz": {"type": "multiple_choice", "path": str(root / "quiz.jsonl"), "prompt": "{question}"},
            "general": {
                "type": "rows",
                "path": str(root / "rows.jsonl"),
                "max_new_tokens": 4,
                "reference": {"path": str(root / "one")},
            },
        },
    }
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    return root
