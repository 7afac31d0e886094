"""A small causal language model of English, trained on plain text files in some minutes on a CPU: something to measure.

python benchmarks/novel_model.py --texts DIR --output runs/novel-model
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from daekit.data.tokenizer import train_tokenizer
from daekit.recipe.schema import TokenizerTraining

LENGTH, BATCH = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="directory of *.txt")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of 2,048 tokens")
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()

    texts = [path.read_text(encoding="utf-8") for path in sorted(options.texts.glob("*.txt"))]
    paragraphs = [line for text in texts for line in text.split("\n") if line.strip()]
    tokenizer = train_tokenizer(iter(paragraphs), TokenizerTraining(vocab_size=4096))
    ids = torch.tensor([token for row in tokenizer(paragraphs)["input_ids"] for token in row])
    print(f"{len(paragraphs):,} paragraphs, {len(ids):,} tokens", flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(options.hidden, len(tokenizer), tokenizer))
    train(model, ids, options.steps)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def config(hidden: int, vocabulary: int, tokenizer: object) -> MistralConfig:
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=True,
        **special,
    )


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> None:
    """AdamW on random windows, with a short warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.process_time()
    for step, windows in zip(range(steps), _windows(ids), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.process_time() - start:.0f} s of CPU", flush=True)


def _windows(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=random)
        yield ids[starts + torch.arange(LENGTH)]


if __name__ == "__main__":
    main()
