"""Tokenizers: trained on the data, or loaded from the hub, a directory or one of the file formats they come in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from daekit.data.rows import form_of
from daekit.data.sentencepiece_file import differs_from_sentencepiece, from_sentencepiece, put_before_texts
from daekit.errors import UserError, first_line
from daekit.recipe.schema import TokenizerSpec, TokenizerTraining
from daekit.recipe.validation import is_local

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
_ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (UNK, BOS, EOS, PAD, *(f"<|{role}|>" for role in _ROLES))

# The generation markers tell TRL's assistant_only_loss which tokens are the assistant's.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("this tokenizer's chat template knows the roles system, user and assistant") }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

# A word or a punctuation mark takes the space before it along; digits stand alone, so that a digit is the same token
# everywhere. What is left (spaces before digits, line ends, further spaces) are tokens of one character.
_PIECES = Regex(r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]|\s")

# Tokens that end a text in the tokenizers of well-known model families.
_KNOWN_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")


def train_tokenizer(texts: Iterable[str], spec: TokenizerTraining) -> PreTrainedTokenizerFast:
    """A tokenizer made for ``texts``; the same texts give the same tokenizer.

    It puts ``<s>`` before a text as Llama's and Mistral's do, has a padding token and a plain chat template, and decodes to
    exactly the text it encoded. ``bpe`` (byte-level, digits apart) does so for any text. ``words`` does for texts over the
    characters that it was trained on; a word it has not seen is put together from the words and letters it knows.
    Its vocabulary may be smaller than ``vocab_size`` when the texts have no more to give.

    Raises:
        UserError: there are no texts; ``vocab_size`` is too small for all words, or for all bytes.
    """
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError("tokenizer.train: the sources have no rows to train a tokenizer on")
    train = _train_words if spec.kind == "words" else _train_bpe
    backend = train(chain([first], texts), spec.vocab_size)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    put_before_texts(backend, BOS)
    special = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    how = {"chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **how)


def source_texts(dataset: Dataset) -> Iterator[str]:
    """All texts of rows of any form: prompts, completions, contents of messages."""
    form = form_of(dataset)
    columns = [form] if form in ("messages", "text") else ["prompt", "completion"]
    for row in dataset.select_columns(columns):
        for value in row.values():
            yield from [value] if isinstance(value, str) else (message["content"] for message in value)


def load_tokenizer(spec: TokenizerSpec) -> PreTrainedTokenizerBase:
    """The tokenizer at ``spec.path``, with a padding token (the one that ends a text if it has none, as TRL does).

    A path is a hub id; a directory with ``tokenizer.json``, with ``vocab.json`` and ``merges.txt`` (GPT-2) or with one
    SentencePiece model; a ``tokenizer.json``; or a SentencePiece model (a name with ``.model`` in it, such as
    ``tokenizer.model.v3``). ``spec.chat_template`` (a template, or the name of a ``.jinja`` file) replaces its own.

    Raises:
        UserError: nothing there, a broken file, a format that is none of these, no token that ends a text.
    """
    assert spec.path is not None, "a recipe gives tokenizer.path or tokenizer.train"
    tokenizer = _load(spec.path, spec.trust_remote_code)
    if spec.chat_template is not None:
        tokenizer.chat_template = _read_template(spec.chat_template)
    if tokenizer.eos_token is None:
        raise UserError(
            f"tokenizer.path: {spec.path} does not say which token ends a text; give a directory with tokenizer.json and a "
            'tokenizer_config.json that has "eos_token"'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---- training --------------------------------------------------------------------------------------------------------


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.train.vocab_size: {vocab_size} is too small; a byte-level one needs {smallest} or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    first: Any = {"special_tokens": list(SPECIAL_TOKENS), "initial_alphabet": sorted(alphabet)}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False, **first)
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    splitter = pre_tokenizers.Split(_PIECES, behavior="isolated")
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    # With every character beside the words, an unseen word can be spelled instead of becoming <unk>.
    characters = sorted({character for piece in pieces for character in piece}.difference(SPECIAL_TOKENS))
    words = sorted(set(pieces).difference(characters), key=lambda piece: (-pieces[piece], piece))
    needed = len(SPECIAL_TOKENS) + len(characters) + len(words)
    if needed > vocab_size:
        raise UserError(
            f"tokenizer.train.vocab_size: {vocab_size} is too small for all words of the training rows; it needs {needed} ("
            f"{len(words)} words, {len(characters)} characters, {len(SPECIAL_TOKENS)} special tokens). Raise it or use bpe"
        )
    # Equal scores make Unigram choose the fewest tokens: a known word is always one.
    vocabulary = [(piece, -1.0) for piece in (*SPECIAL_TOKENS, *characters, *words)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index(UNK)))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Fuse()
    return backend


# ---- loading ---------------------------------------------------------------------------------------------------------


def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    local = Path(path).expanduser()
    if local.is_file():
        return _from_file(local, trust_remote_code)
    if local.is_dir():
        return _from_directory(local, trust_remote_code)
    if is_local(path, ()):
        raise UserError(f"tokenizer.path: {path} does not exist; give a hub id, a directory or a tokenizer file")
    return _auto(path, trust_remote_code)


def _from_file(file: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if ".model" in file.suffixes:
        return from_sentencepiece(file)
    if file.suffix != ".json":
        raise UserError(
            f"tokenizer.path: {file} is of no known format; it must be tokenizer.json or a SentencePiece .model file"
        )
    if file.name == "tokenizer.json" and file.with_name("tokenizer_config.json").is_file():
        return _auto(str(file.parent), trust_remote_code)
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"tokenizer.path: {file} is not a file of the tokenizers library ({first_line(error)})") from error
    return _wrap(backend)


def _from_directory(directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    names = {file.name for file in directory.iterdir()}
    pieces = sorted(file for file in directory.iterdir() if ".model" in file.suffixes)
    if "tokenizer.json" in names:
        return _auto(str(directory), trust_remote_code)
    if "tokenizer_config.json" in names:
        # without tokenizer.json transformers converts its SentencePiece model anew, and not always faithfully
        tokenizer = _auto(str(directory), trust_remote_code)
        text = differs_from_sentencepiece(tokenizer, pieces[0]) if len(pieces) == 1 else None
        if text is None:
            return tokenizer
        raise UserError(
            f"tokenizer.path: transformers reads {directory} in another way than SentencePiece itself ({text!r} becomes other "
            f"tokens), so its ids would not be the model's; name the file {pieces[0]} instead"
        )
    if {"vocab.json", "merges.txt"} <= names:
        return _byte_level(directory)
    if len(pieces) == 1:
        return from_sentencepiece(pieces[0])
    if pieces:
        listed = ", ".join(file.name for file in pieces)
        raise UserError(f"tokenizer.path: {directory} holds several SentencePiece models ({listed}); name one of them")
    raise UserError(
        f"tokenizer.path: {directory} holds no tokenizer (tokenizer.json, vocab.json and merges.txt, or a .model file)"
    )


def _auto(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        raise UserError(
            f"tokenizer.path: no tokenizer could be loaded from {path!r} ({first_line(error)}); "
            "check the name, your access and the network, or give a directory or file"
        ) from error


def _byte_level(directory: Path) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(
            f"tokenizer.path: vocab.json and merges.txt of {directory} do not make a tokenizer ({first_line(error)})"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A bare backend does not say which token ends a text; it is known if exactly one of the usual ones is there."""
    vocabulary = backend.get_vocab()
    found = [token for token in _KNOWN_EOS if token in vocabulary]
    special = {}
    if len(found) == 1:
        special = {"eos_token": found[0]} | ({"unk_token": UNK} if UNK in vocabulary else {})
        special |= {"bos_token": BOS} if found[0] == EOS and BOS in vocabulary else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _read_template(template: str) -> str:
    if not template.endswith(".jinja"):
        return template
    try:
        return Path(template).expanduser().read_text()
    except OSError as error:
        raise UserError(f"tokenizer.chat_template: {template} cannot be read ({first_line(error)})") from error
