"""What quantising costs in nats: a small Mixtral is trained on running text, quantised, and compared on a text it has not seen.

KL(16 bits || quantised) per token, in nats, next to the negative log-likelihood; ``stock`` quantises as transformers does,
which leaves experts in 16 bits. The budget is CPU time, so that a busy machine trains as long as a quiet one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import machine_facts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from daekit.models.loading import load_model
from daekit.models.quantization import keep_four_bit_weights, quantization_config
from daekit.recipe.schema import ModelSpec

VOCABULARY, LENGTH, BATCH, LEARNING_RATE = 1024, 96, 16, 4e-3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a folder of *.txt; the last one is held out")
    parser.add_argument("--seconds", type=float, default=150, help="of CPU time, for training")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device, options.dtype, options.repeats = torch.device("cpu"), torch.bfloat16, 1
    torch.manual_seed(0)
    train, held = tokens(sorted(options.texts.glob("*.txt")))
    model, steps = trained(train, options.seconds)
    folder = Path(tempfile.mkdtemp())
    try:
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        rows = compared(str(folder), held, {"steps": steps, "seconds": options.seconds} | machine_facts(options))
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def tokens(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Training tokens, and 64 pieces of the last text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file) for file in files[:3]], trainer)
    read = [torch.tensor(tokenizer.encode(file.read_text()[:1_000_000]).ids) for file in [*files[:8], files[-1]]]
    return torch.cat(read[:-1]), read[-1][: 64 * LENGTH].view(64, LENGTH)


def trained(text: Tensor, seconds: float) -> tuple[PreTrainedModel, int]:
    """A Mixtral of 1.6 million parameters after so much CPU time."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    start, step = time.process_time(), 0
    while (spent := (time.process_time() - start) / seconds) < 1:
        places = torch.randint(0, len(text) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([text[place : place + LENGTH] for place in places])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 30) * max(0.03, 1 - spent)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {spent:.0%}: {loss.item():.3f}", flush=True)
    return model, step


def compared(path: str, held: Tensor, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per way of quantising."""
    found = {"16 bits": log_probs(load_model(ModelSpec(path=path, dtype="bfloat16")), held)}
    found["float32"] = log_probs(load_model(ModelSpec(path=path, dtype="float32")), held)
    for bits in ("4bit", "8bit"):
        spec = ModelSpec(path=path, dtype="bfloat16", quantization=bits)  # type: ignore[arg-type]
        found[bits] = log_probs(load_model(spec), held)
        options = {"quantization_config": quantization_config(spec), "dtype": torch.bfloat16}
        stock = AutoModelForCausalLM.from_pretrained(path, **options)
        keep_four_bit_weights(stock)
        found[f"{bits} stock"] = log_probs(stock, held)
    rows, whole = [], found["16 bits"]
    for name, theirs in found.items():
        kl = (whole.exp() * (whole - theirs)).sum(-1).mean().item()
        nll = -theirs.gather(-1, held[:, 1:, None]).mean().item()
        same = (whole.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        rows.append({"case": name, "kl": kl, "nll": nll, "same_first_choice": same} | facts)
        print(f"{name:<12} KL {kl:.6f} nats, NLL {nll:.4f}, same first choice {same:.1%}", flush=True)
    return rows


@torch.no_grad()
def log_probs(model: PreTrainedModel, held: Tensor) -> Tensor:
    """``[64, T - 1, V]``."""
    model.eval()
    return torch.cat([model(input_ids=part).logits[:, :-1].float().log_softmax(-1) for part in held.split(16)])


if __name__ == "__main__":
    main()
