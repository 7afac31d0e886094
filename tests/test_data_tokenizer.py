"""Tokenizers: exact round trips, the same ids after saving, the same ids as SentencePiece, clear refusals."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from daekit.data.builtin import builtin_rows
from daekit.data.sentencepiece_file import from_sentencepiece
from daekit.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, source_texts, train_tokenizer
from daekit.errors import UserError
from daekit.recipe.schema import TokenizerSpec, TokenizerTraining

TEXTS = [
    "the oak table: What does the oak table cost?  It's 42.50 coins,\n\tfor 3 of them (naïve déjà vu).",
    "add 17 and 25: 42, the coins?",
    "reverse l a m o p: p o m a l",
]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "add 1 and 2:"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "and 4?"},
    {"role": "assistant", "content": "7"},
]


def trained(kind: str, vocab_size: int = 400, texts: list[str] | None = None) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts or TEXTS * 3, TokenizerTraining(vocab_size=vocab_size, kind=kind))  # type: ignore[arg-type]


def decoded(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_special_tokens_and_lengths(kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    ids = tokenizer("add 17</s>")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.model_max_length > 10**9
    assert len(tokenizer) <= 400 and max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_words_of_the_builtin_corpora_come_back_exactly() -> None:
    rows = [row for name in ("skills", "chat", "shop") for row in builtin_rows(name, "train")]
    texts = [row[column] for row in random.Random(0).sample(rows, 1500) for column in ("prompt", "completion")]
    tokenizer = trained("words", 1000, texts)
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        # one token per word, digit and punctuation mark: at most one more for each space before a digit
        assert len(ids) - 1 <= len([c for c in text if c.isdigit() or not c.isalnum()]) + len(text.split())


def test_words_are_one_token_and_digits_stand_alone() -> None:
    tokenizer = trained("words")
    assert tokenizer.tokenize("the table cost 42 coins?") == ["the", " table", " cost", " ", "4", "2", " coins", "?"]
    assert tokenizer.tokenize("17") == BYTES.tokenize("17") == ["1", "7"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=sorted(set("".join(TEXTS))), max_size=30))
def test_unseen_words_are_spelled(text: str) -> None:
    ids = WORDS(text)["input_ids"]
    assert WORDS.unk_token_id not in ids and WORDS.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_bytes_round_trip_any_text(text: str) -> None:
    assert decoded(BYTES, text) == text


WORDS, BYTES = trained("words"), trained("bpe")


@pytest.mark.slow
def test_training_is_deterministic_across_processes() -> None:
    code = (
        "from daekit.data.tokenizer import train_tokenizer; from daekit.recipe.schema import TokenizerTraining\n"
        "for kind in ('bpe', 'words'):\n"
        f"    print(train_tokenizer({TEXTS * 3!r}, TokenizerTraining(vocab_size=400, kind=kind)).backend_tokenizer.to_str())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = [trained(kind).backend_tokenizer.to_str() for kind in ("bpe", "words")]  # type: ignore[attr-defined]
    assert json.loads("[" + ",".join(out.strip().split("\n")) + "]") == [json.loads(text) for text in here]


@pytest.mark.parametrize("kind", ["bpe", "words"])
@pytest.mark.parametrize("model_type", [None, "mistral", "mixtral", "llama"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, kind: str, model_type: str | None) -> None:
    """Also beside a model's config, by which AutoTokenizer may choose another class."""
    tokenizer = trained(kind)
    if model_type:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(TokenizerSpec(path=str(tmp_path)))):
        assert again.get_vocab() == tokenizer.get_vocab()
        for text in [*TEXTS, "unseen lamp</s>", ""]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert decoded(again, text) == decoded(tokenizer, text)
        assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
        assert again.pad_token == "<pad>"


def test_chat_template_marks_the_assistant_and_grows_by_appending() -> None:
    tokenizer = trained("words", texts=[*TEXTS, *(message["content"] for message in CHAT)])
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(said) == ["3", "</s>", "7", "</s>"]
    prompt = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True)["input_ids"]
    assert whole["input_ids"][: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(whole["input_ids"][len(prompt) :]) == ["7", "</s>"]
    assert whole["input_ids"][0] == tokenizer.bos_token_id and whole["input_ids"].count(tokenizer.bos_token_id) == 1
    with pytest.raises(Exception, match="roles system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_texts_of_every_form() -> None:
    chat = [CHAT]
    assert list(source_texts(Dataset.from_dict({"text": ["a", "b"], "domain": ["d"] * 2}))) == ["a", "b"]
    assert list(source_texts(Dataset.from_dict({"prompt": ["p"], "completion": ["c"], "answer": ["x"]}))) == ["p", "c"]
    assert list(source_texts(Dataset.from_dict({"messages": chat}))) == [message["content"] for message in CHAT]
    assert len(list(source_texts(Dataset.from_dict({"prompt": chat, "completion": chat})))) == 2 * len(CHAT)


def test_a_vocabulary_that_is_too_small() -> None:
    needed = len(WORDS)
    with pytest.raises(UserError, match=f"vocab_size: {needed - 1} is too small for all words.*it needs {needed} "):
        trained("words", needed - 1)
    assert len(trained("words", needed)) == needed
    with pytest.raises(UserError, match="vocab_size: 200 is too small; a byte-level one needs 263"):
        trained("bpe", 200)
    for kind in ("bpe", "words"):
        with pytest.raises(UserError, match="no rows to train a tokenizer"):
            train_tokenizer([], TokenizerTraining(vocab_size=500, kind=kind))  # type: ignore[arg-type]


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def sentencepiece_file(path: Path, **options: object) -> Path:
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ter", "an", "dro", "su", "é"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    lines = [" ".join(rng.choices(words, k=8)) + f", {rng.randrange(1000)}." for _ in range(800)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=buffer, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(buffer.getvalue())
    return path


LIKE_MISTRAL = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "control_symbols": ["[INST]", "[/INST]"],
    "user_defined_symbols": ["[DOC]", "[DOC_1]"],
    "vocab_size": 400,
}
DEFAULTS = {"model_type": "unigram", "vocab_size": 200}


@pytest.mark.parametrize(("name", "options"), [("tokenizer.model.v3", LIKE_MISTRAL), ("spm.model", DEFAULTS)])
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    file = sentencepiece_file(tmp_path / name, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(TokenizerSpec(path=str(file)))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [
        "kalo mi",
        "  kalo   mi  ",
        "terandro 123, ka.",
        "日本 é\n\tx",
        "kalo" * 20,
        "a\u2581b",
        "ka[DOC]lo [DOC_1] mi",
        "",
    ]:
        ids = processor.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == [processor.bos_id(), *ids]
        if processor.unk_id() not in ids:
            assert decoded(again, text) == processor.decode(ids)
    assert (again.bos_token, again.eos_token, again.unk_token, again.pad_token) == ("<s>", "</s>", "<unk>", "</s>")


def test_merges_go_by_score_and_not_by_id(tmp_path: Path) -> None:
    """In Mistral's model the ids of runs of spaces are small and their scores the worst."""
    file = sentencepiece_file(tmp_path / "tokenizer.model", **LIKE_MISTRAL)
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(file.read_bytes())
    normal = [index for index, piece in enumerate(proto.pieces) if piece.type == 1]
    backwards = [(proto.pieces[index].piece, proto.pieces[index].score) for index in reversed(normal)]
    for index, (piece, score) in zip(normal, backwards, strict=True):
        proto.pieces[index].piece, proto.pieces[index].score = piece, score
    file.write_bytes(proto.SerializeToString())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    text = "kalo milotersuan dromiteré 123, terandro."
    assert from_sentencepiece(file)(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


def test_control_tokens_are_special(tmp_path: Path) -> None:
    tokenizer = from_sentencepiece(sentencepiece_file(tmp_path / "tokenizer.model", **LIKE_MISTRAL))
    ids = tokenizer("[INST] ka [/INST] lo</s>")["input_ids"]
    for token in ("<s>", "[INST]", "[/INST]", "</s>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert "[INST]" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_a_model_that_cannot_be_reproduced_is_refused(tmp_path: Path) -> None:
    options = LIKE_MISTRAL | {"treat_whitespace_as_suffix": True}
    with pytest.raises(UserError, match=r"cannot be turned into a fast tokenizer with the same ids \(.Hello World"):
        load_tokenizer(TokenizerSpec(path=str(sentencepiece_file(tmp_path / "a.model", **options))))
    with pytest.raises(UserError, match="only BPE and Unigram"):
        load_tokenizer(TokenizerSpec(path=str(sentencepiece_file(tmp_path / "b.model", model_type="char", vocab_size=30))))


def test_transformers_own_reading_of_a_sentencepiece_model_is_checked(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path / "tokenizer.model", **LIKE_MISTRAL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match=r"in another way than SentencePiece itself.*name the file .*tokenizer.model"):
        load_tokenizer(TokenizerSpec(path=str(tmp_path)))


# ---- other files -----------------------------------------------------------------------------------------------------


def test_vocab_and_merges(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(["a", "b", "ab", "Ġ", "Ġa", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    tokenizer = load_tokenizer(TokenizerSpec(path=str(tmp_path)))
    assert tokenizer("ab ab a<|endoftext|>")["input_ids"] == [2, 3, 2, 4, 5]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert decoded(tokenizer, "ab ab a") == "ab ab a"


def test_a_bare_tokenizer_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    trained("bpe").backend_tokenizer.save(str(file))  # type: ignore[attr-defined]
    tokenizer = load_tokenizer(TokenizerSpec(path=str(file)))
    assert tokenizer(TEXTS[0])["input_ids"] == BYTES(TEXTS[0])["input_ids"]
    assert tokenizer.eos_token == "</s>"
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(file))
    with pytest.raises(UserError, match="does not say which token ends a text"):
        load_tokenizer(TokenizerSpec(path=str(file)))


def test_chat_template_from_text_and_file(tmp_path: Path) -> None:
    trained("bpe").save_pretrained(tmp_path / "t")
    path = str(tmp_path / "t")
    assert load_tokenizer(TokenizerSpec(path=path, chat_template="{{ 'x' }}")).chat_template == "{{ 'x' }}"
    (tmp_path / "c.jinja").write_text("{{ 'y' }}")
    assert load_tokenizer(TokenizerSpec(path=path, chat_template=str(tmp_path / "c.jinja"))).chat_template == "{{ 'y' }}"
    with pytest.raises(UserError, match=r"none.jinja cannot be read"):
        load_tokenizer(TokenizerSpec(path=path, chat_template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nowhere/at/all", "does not exist"),
        ({}, "nobody/nothing", "no tokenizer could be loaded from 'nobody/nothing'"),
        ({"a.txt": "x"}, "", "holds no tokenizer"),
        ({"a.txt": "x"}, "a.txt", "is of no known format"),
        ({"tokenizer.model.v1": "x", "tokenizer.model.v3": "x"}, "", "several SentencePiece models .*name one"),
        ({"tokenizer.model": "not a protobuf"}, "", "SentencePiece model"),
        ({"tokenizer.model": ""}, "tokenizer.model", "holds no pieces"),
        ({"tokenizer.json": "{}"}, "", "no tokenizer could be loaded"),
        ({"tokenizer.json": "{"}, "tokenizer.json", "is not a file of the tokenizers library"),
        ({"vocab.json": "{", "merges.txt": ""}, "", "do not make a tokenizer"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, files: dict[str, str], path: str, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    full = path if not files else str(tmp_path / path)
    with pytest.raises(UserError, match="^tokenizer.path: .*" + message):
        load_tokenizer(TokenizerSpec(path=full))
