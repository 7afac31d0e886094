"""The recipes of small families run on shrunken copies of both models, with their kinds of tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from daekit.cli import main
from daekit.planning.resolve import known_shapes
from daekit.recipe import load_recipe
from tests.helpers.recipes import ROOT

TEXTS = [f"How much is the kettle number {i}? It costs {i * 7} euros, and it ships in {i % 5} days." for i in range(40)]
SHRUNKEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.1}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
SPECIAL = {
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "qwen2_5": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "gemma3": ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
}
ROLES = {
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen2_5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3_2": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
}


def tokenizer_like(family: str) -> PreTrainedTokenizerFast:
    """A small BPE, cut, marked and templated as that of the family; Gemma's has one token too many, for images."""
    core = Tokenizer(models.BPE(byte_fallback=family == "gemma3", unk_token="<unk>" if family == "gemma3" else None))
    start: list[str] = [*SPECIAL[family]]
    if family == "gemma3":
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace()
        start += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = [] if family == "gemma3" else pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=start, initial_alphabet=alphabet))
    bos = ROLES[family].get("bos_token")
    if bos:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **ROLES[family])
    if family == "gemma3":
        fast.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    fast.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    return fast


def shrunken(identifier: str, width: int, seed: int, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model of the published kind and few parameters, saved; ``width``: of its vocabulary."""
    config: dict[str, Any] = json.loads(json.dumps(known_shapes()[identifier]["config"]))
    text = config.get("text_config", config)
    groups = text["num_attention_heads"] // text["num_key_value_heads"]
    text |= SHRUNKEN | {"num_attention_heads": 4, "num_key_value_heads": max(4 // groups, 1), "vocab_size": width}
    if "head_dim" in text:
        text["head_dim"] = 16
    if "vision_config" in config:
        config |= {"image_token_id": width - 1}
        config["vision_config"] |= VISION
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_file(path: Path, count: int) -> Path:
    rows = [{"instruction": text.split("? ")[0] + "?", "response": text.split("? ")[1]} for text in TEXTS[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# of the vocabularies: what the published ones have beyond their tokenizers (Gemma's student lacks the token for images)
PAIRS = {
    "qwen3-small": ("qwen3", 3, 3),
    "qwen2.5-small": ("qwen2_5", 3, 9),
    "llama-small": ("llama3_2", 0, 0),
    "gemma3-small": ("gemma3", -1, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_small_pair_runs(name: str, tmp_path: Path) -> None:
    family, student_more, teacher_more = PAIRS[name]
    tokenizer, path = tokenizer_like(family), ROOT / "recipes" / f"{name}.yaml"
    kd = load_recipe(path).stages["kd"]
    assert kd.type == "kd" and kd.student is not None and kd.teacher.model is not None
    published = (str(kd.student.path), str(kd.teacher.model.path))
    student = shrunken(published[0], len(tokenizer) + student_more, 0, tmp_path / "student", tokenizer)
    teacher = shrunken(published[1], len(tokenizer) + teacher_more, 1, tmp_path / "teacher", tokenizer)
    overrides = [f"output_dir={tmp_path / 'run'}", "evaluation.limit=2", "evaluation.max_new_tokens=3"]
    overrides += [f"sources.{source}.path={rows_file(tmp_path / f'{source}.jsonl', 20)}" for source in ("general", "shop")]
    overrides += [f"sources.{source}.holdout=4" for source in ("general", "shop")]
    overrides += [f"models.student={student}", f"models.teacher={teacher}"]
    few = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    overrides += [f"stages.{stage}.trainer.{key}={value}" for stage in ("kd", "expert", "dae") for key, value in few.items()]
    assert main(["train", str(path), *overrides]) == 0
    before = load_file(student / "model.safetensors")
    stages = tmp_path / "run" / "stages"
    for stage in ("kd", "expert", "dae"):
        log = json.loads((stages / stage / "stage.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
        after = load_file(stages / stage / "model" / "model.safetensors")
        assert after.keys() == before.keys() and any(not torch.equal(after[key].bfloat16(), before[key]) for key in before)
        if stage == "dae":  # it begins as its reference, and has seen one step of the expert's domain at most
            assert log[0].get("kl/general", 0.0) < 1e-2
