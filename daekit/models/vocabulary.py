"""Do two tokenizers mean the same by the same ids? Compared by content: equal sizes prove nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.sharded import shape_of

# what tokenizers of equal vocabularies still do differently: spaces, digits, case, accents, line ends, code, emoji
_PROBE = "Hello  World 12345 3.14,\n\tdéjà vu — naïve; x += 1 # 東京 🙂 'quotes' \"and\" end."
_MOST_PROBED = 64  # tokens of each kind in a probe
_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")


class VocabularySize(int):
    """V, the number of ids, and how few columns a head may have for it.

    Attributes:
        least: one more than the highest id of a token that was not added, or has a role (end, padding...). Gemma 3 at 270M
            and 1B has one token for images, of which neither its embeddings nor its head know; it trains on text all the same.
    """

    least: int


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> VocabularySize:
    """V: one more than the highest id that the tokenizer knows, added tokens included."""
    ids, added = tokenizer.get_vocab().values(), tokenizer.added_tokens_decoder
    roles = [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")]
    size = VocabularySize(max(ids) + 1)
    size.least = max([*(i for i in ids if i not in added), *(i for i in roles if i is not None)], default=-1) + 1
    return size


def known_ids(models: Iterable[nn.Module]) -> int:
    """How many ids all models know, by the rows of their embeddings and output heads."""
    ends = [end for model in models for end in (model.get_input_embeddings(), model.get_output_embeddings())]  # type: ignore[operator]
    return min(shape_of(end.weight)[0] for end in ends)


def differences(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("the student", "the teacher"),
) -> list[str]:
    """What differs between two tokenizers, in words; empty if a distribution over ids means the same to both.

    The padding token may differ: padded positions never take part in a loss. ``names``: what the two models are called.
    """
    found = []
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        only_ours = sorted(set(ours) - set(theirs), key=ours.__getitem__)
        only_theirs = sorted(set(theirs) - set(ours), key=theirs.__getitem__)
        moved = [token for token in ours if token in theirs and ours[token] != theirs[token]]
        kinds = {f"only {names[0]}'s tokenizer has": only_ours, f"only {names[1]}'s tokenizer has": only_theirs}
        for what, tokens in (kinds | {"under another id are": moved}).items():
            if tokens:
                found.append(f"{what} {len(tokens)} tokens (such as {', '.join(map(repr, tokens[:3]))})")
    for name in _SPECIAL:
        a, b = getattr(student, name), getattr(teacher, name)
        if a != b:
            found.append(f"{name} is {a} for {names[0]} and {b} for {names[1]}")
    if not found:
        a, b = _probe_ids(student), _probe_ids(teacher)
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            found.append(f"the same text is cut differently, first at token {at} ({a[at : at + 3]} against {b[at : at + 3]})")
    return found


def require_same(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_name: str) -> None:
    """Raise a UserError that says what differs, if the two tokenizers are not the same."""
    if found := differences(student, teacher):
        raise UserError(
            f"teacher {teacher_name}: its tokenizer is not the student's, so its distribution is over other tokens: "
            + "; ".join(found)
            + ". Use a teacher and a student that share a tokenizer."
        )


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> Any:
    return tokenizer(_PROBE)["input_ids"]


def probe_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that tokenizers cut differently if they differ: hard cases, added tokens, tokens from all over."""
    size = vocabulary_size(tokenizer)
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())][:_MOST_PROBED]
    spread = tokenizer.decode(range(0, size, -(-size // _MOST_PROBED)), skip_special_tokens=True)
    return " ".join([_PROBE, *added, spread])


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """A tokenizer by content, JSON-able: two that ``differences`` calls equal have the same facts."""

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "special_ids": {name: getattr(tokenizer, name) for name in _SPECIAL},
        "cuts": digest(list(_probe_ids(tokenizer))),
    }
