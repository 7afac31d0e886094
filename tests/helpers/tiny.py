"""A tiny world for tests: a word tokenizer, models of a few thousand parameters, rows of random words."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
PADDED_VOCABULARY = 48  # wider than the tokenizer, as real models are
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w1 {% generation %}"
    "{{ message['content'] }} </s>{% endgeneration %} {% else %}w0 {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; knows a chat template with generation markers."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """The same words, two of them under other ids."""
    text = json.loads(tokenizer().backend_tokenizer.to_str())
    vocab = text["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    core = Tokenizer.from_str(json.dumps(text))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def model(kind: str = "mistral", seed: int = 0, hidden: int = 32, **fields: Any) -> PreTrainedModel:
    """A random ``mistral`` or ``mixtral`` with 2 layers, 4 query and 2 key/value heads, and a vocabulary padded to 48."""
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # so that distributions differ visibly
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    common |= fields
    if kind == "mixtral":
        config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **common)
    else:
        config = MistralConfig(**common)
    return AutoModelForCausalLM.from_config(config)


def words(rng: random.Random, low: int, high: int) -> str:
    """Between ``low`` and ``high`` random words."""
    return " ".join(f"w{rng.randrange(40)}" for _ in range(rng.randint(low, high)))


def rows(count: int, seed: int = 0, domains: tuple[str, ...] = ("general", "shop")) -> Dataset:
    """Prompt/completion rows of random words with a random domain."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": words(rng, 2, 8) + " ", "completion": words(rng, 1, 6), "domain": rng.choice(domains)}
            for _ in range(count)
        ]
    )
