"""The data room on real data: run where the shared data lie beside the repository (or in DAEKIT_SHARED), else skipped."""

from __future__ import annotations

import time

import pytest
from sentencepiece import SentencePieceProcessor

from daekit.data.fingerprint import data_fingerprint
from daekit.data.mixture import mix
from daekit.data.sources import load_source
from daekit.data.tokenizer import load_tokenizer, source_texts, train_tokenizer
from daekit.recipe.schema import MixtureSpec, SourceSpec, TokenizerSpec, TokenizerTraining
from tests.helpers.shared_data import DATA

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")


def test_both_sources_load_fast_and_mix() -> None:
    begin = time.process_time()
    general, held = load_source(
        "general", SourceSpec(domain="general", path=str(DATA / "general"), validation_split="validation"), 0
    )
    seconds = time.process_time() - begin
    assert held is not None and (len(general), len(held)) == (70168, 2000)
    assert seconds < 4, f"{seconds:.1f} s for 72,168 rows"
    begin = time.process_time()
    assert len(data_fingerprint(general)) == 32
    assert general.data.nbytes / (time.process_time() - begin) > 100e6
    shop, _ = load_source("shop", SourceSpec(domain="ecommerce", path=str(DATA / "ecommerce/train.jsonl")), 0)
    mixture = mix({"general": general, "shop": shop}, MixtureSpec(sources=("general", "shop"), weights=(0.75, 0.25)), 0)
    assert [use.used for use in mixture.table] == [30120, 10040]


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_tokenizers_give_the_ids_of_sentencepiece(name: str) -> None:
    file = str(DATA / "tokenizers/mistral" / name)
    tokenizer, processor = load_tokenizer(TokenizerSpec(path=file)), SentencePieceProcessor(model_file=file)
    texts = [text for source in ("general", "ecommerce") for text in source_texts(_rows(source, 1500))]
    novels = sorted((DATA / "novels").glob("*.txt"))[:4]
    texts += [line for novel in novels for line in novel.read_text().split("\n")[:200]]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == processor.encode(texts)


def test_gpt2_directory() -> None:
    tokenizer = load_tokenizer(TokenizerSpec(path=str(DATA / "tokenizers/gpt2")))
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    assert tokenizer("Hello world<|endoftext|>")["input_ids"] == [15496, 995, 50256]  # as published for GPT-2


def test_a_tokenizer_trained_on_real_rows_is_exact() -> None:
    texts = list(source_texts(_rows("ecommerce", 2000)))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=2000))
    assert len(tokenizer) == 2000
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert sum(map(len, texts)) / sum(map(len, ids)) > 2.5  # characters per token


def _rows(source: str, limit: int):  # type: ignore[no-untyped-def]
    return load_source(source, SourceSpec(domain=source, path=str(DATA / source / "train.jsonl"), limit=limit), 0)[0]
