"""A small world on disk and a recipe whose teachers are all cached."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.helpers import tiny

STAGES = """
name: cached
output_dir: OUT/run
tokenizer: {path: OUT/base}
sources:
  general: {domain: general, path: OUT/general.jsonl}
  shop: {domain: shop, path: OUT/shop.jsonl, validation: OUT/valid.jsonl}
stages:
  kd:
    type: kd
    student: OUT/student
    teacher: {path: OUT/base, cache: hidden}
    data: [general]
    trainer: &trainer {max_steps: 4, per_device_train_batch_size: 4, pad_to_multiple_of: 64, gradient_checkpointing: false,
                       report_to: none, save_strategy: "no", learning_rate: 1.0e-3}
  dae:
    type: dae
    teachers: {shop: {path: OUT/expert, cache: {keep: hidden}}}
    reference: {cache: hidden}
    data: [general, shop]
    trainer: {<<: *trainer, eval_strategy: steps, eval_steps: 2}
"""


def build_world(root: Path) -> Path:
    """Three models and rows of two domains."""
    for seed, name in enumerate(("base", "expert", "student")):
        tiny.model(seed=seed).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    for seed, (name, count) in enumerate({"general": 12, "shop": 9, "valid": 4}.items()):
        lines = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in tiny.rows(count, seed=seed)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def recipe_text(world: Path, out: Path, live: bool = False) -> str:
    """The recipe, or the same without caches."""
    tree = yaml.safe_load(STAGES.replace("OUT", str(world)))
    tree["output_dir"] = str(out)
    if live:
        del tree["stages"]["kd"]["teacher"]["cache"], tree["stages"]["dae"]["reference"]
        del tree["stages"]["dae"]["teachers"]["shop"]["cache"]
    return yaml.safe_dump(tree, sort_keys=False)
