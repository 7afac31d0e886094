"""What the examples run on when no model is named: small random models and the corpora embedded in daekit, all offline."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from daekit.data.builtin import builtin_rows
from daekit.data.tokenizer import source_texts, train_tokenizer
from daekit.recipe.schema import TokenizerTraining


def rows(corpus: str, split: str = "train", count: int = 256, domain: str = "general") -> Dataset:
    """Prompt/completion rows of an embedded corpus, with their domain."""
    chosen = [
        {"prompt": row["prompt"], "completion": row["completion"], "domain": domain} for row in builtin_rows(corpus, split)
    ]
    return Dataset.from_list(chosen[:count])


def tokenizer_for(data: Dataset) -> PreTrainedTokenizerBase:
    """One token per word of ``data``."""
    return train_tokenizer(source_texts(data), TokenizerTraining(vocab_size=2000, kind="words"))


def random_model(model_type: str, tokenizer: PreTrainedTokenizerBase, hidden_size: int = 64) -> PreTrainedModel:
    """An untrained ``mistral`` or ``mixtral`` of two layers."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(hidden_size)
    return AutoModelForCausalLM.from_config(config)
