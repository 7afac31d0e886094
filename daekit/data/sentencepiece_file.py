"""A SentencePiece model file as a fast tokenizer with the same ids.

transformers 5 orders the merges of a bare BPE model by id instead of by score, adds no prefix space before leading spaces,
and puts no ``<s>`` before a text: with Mistral's own file 377 of 24,864 texts came out in other ids than SentencePiece's. So
the backend is built here, and compared with SentencePiece whenever one is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from daekit.errors import UserError

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # ModelProto.SentencePiece.Type

# Spaces at every place, digits, case, accents, compatibility characters, line ends, scripts, emoji, what is unknown.
_PROBES = (
    "Hello World 12345 3.14, and a long sentence with several common words; isn't it?",
    "two  spaces,   three,    four,        eight",
    " one before",
    "   three before and after   ",
    "line\n\n  indented\n\ttab\r\n",
    "déjà vu naïve Ünïcödé, e\u0301, ﬁ ½ ①, Straße",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # code",
    "日本語 Русский العربية हिन्दी 한국어 🙂👩‍🚀",
    "\u00a0\u200b\u3000zero width and wide spaces",
)


def from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model (BPE or Unigram); each stretch between control tokens is encoded as there.

    Control tokens (``<s>``, ``[INST]``) are special tokens here: SentencePiece never reads them in a text. ``<s>`` is put
    before a text if the model has it, as Llama's and Mistral's tokenizers do.

    Raises:
        UserError: not a SentencePiece model, one of another kind, or one that a fast tokenizer cannot reproduce.
    """
    proto = _read(file)
    backend = Tokenizer(_model(proto, file))
    backend.normalizer = _normalizer(proto)
    backend.decoder = _decoder(proto)
    backend.add_special_tokens(
        [AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type == _CONTROL]
    )
    own = _own_symbols(proto)
    if own:
        # As added tokens they would cut the text before it is normalised: each part would get a prefix space of its own.
        any_of_them = "|".join(re.escape(symbol) for symbol in sorted(own, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(any_of_them), behavior="isolated")
    ids = {f"{role}_token": getattr(proto.trainer_spec, f"{role}_id") for role in ("unk", "bos", "eos", "pad")}
    special = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    if "bos_token" in special:
        put_before_texts(backend, special["bos_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    text = differs_from_sentencepiece(tokenizer, file, [f"a{symbol} b {symbol}" for symbol in own])
    if text is not None:
        raise UserError(
            f"tokenizer.path: {file} cannot be turned into a fast tokenizer with the same ids ({text!r} differs); "
            "give a directory with the tokenizer.json that its model was published with"
        )
    return tokenizer


def put_before_texts(backend: Tokenizer, bos: str) -> None:
    """Let a tokenizer put a token before each text, as Llama's and Mistral's do."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def differs_from_sentencepiece(tokenizer: PreTrainedTokenizerBase, file: Path, more: Iterable[str] = ()) -> str | None:
    """The first of some probe texts that the tokenizer encodes otherwise than the SentencePiece model itself, or None."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(file))
    for text in (*_PROBES, *more):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != processor.encode(text):
            return text
    return None


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"tokenizer.path: {file} is not a readable SentencePiece model ({error})") from error
    if not proto.pieces:
        raise UserError(f"tokenizer.path: {file} is not a SentencePiece model: it holds no pieces")
    return proto


def _model(proto: Any, file: Path) -> models.Model:
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    if proto.trainer_spec.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unk = proto.pieces[proto.trainer_spec.unk_id].piece
        whole = bool(_own_symbols(proto))  # no merges lead to them: they are taken whole
        how: Any = {"unk_token": unk, "fuse_unk": True, "byte_fallback": fallback, "ignore_merges": whole}
        return models.BPE(vocabulary, _merges(proto), **how)
    raise UserError(f"tokenizer.path: {file} is a SentencePiece model of words or characters; only BPE and Unigram are read")


def _own_symbols(proto: Any) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, best score first: SentencePiece merges by the score of the result."""
    mergeable = {p.piece: p.score for p in proto.pieces if p.type not in (_CONTROL, _UNUSED)}
    ranked = sorted(mergeable, key=lambda piece: -mergeable[piece])  # stable: equal scores stay in the order of their ids
    pairs = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in mergeable and right in mergeable]


def _normalizer(proto: Any) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)
