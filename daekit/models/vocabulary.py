"""Do two tokenizers mean the same by the same ids? Compared by content: equal sizes prove nothing."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError

# what tokenizers of equal vocabularies still do differently: spaces, digits, case, accents, line ends, code, emoji
_PROBE = "Hello  World 12345 3.14,\n\tdéjà vu — naïve; x += 1 # 東京 🙂 'quotes' \"and\" end."
_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: one more than the highest id that the tokenizer knows, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """What differs between two tokenizers, in words; empty if a distribution over ids means the same to both.

    The padding token may differ: padded positions never take part in a loss.
    """
    found = []
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        only_ours = sorted(set(ours) - set(theirs), key=ours.__getitem__)
        only_theirs = sorted(set(theirs) - set(ours), key=theirs.__getitem__)
        moved = [token for token in ours if token in theirs and ours[token] != theirs[token]]
        for what, tokens in (
            ("only the student's tokenizer has", only_ours),
            ("only the teacher's tokenizer has", only_theirs),
            ("under another id are", moved),
        ):
            if tokens:
                found.append(f"{what} {len(tokens)} tokens (such as {', '.join(map(repr, tokens[:3]))})")
    for name in _SPECIAL:
        a, b = getattr(student, name), getattr(teacher, name)
        if a != b:
            found.append(f"{name} is {a} for the student and {b} for the teacher")
    if not found:
        a, b = _probe_ids(student), _probe_ids(teacher)
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            found.append(f"the same text is cut differently, first at token {at} ({a[at : at + 3]} against {b[at : at + 3]})")
    return found


def require_same(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_name: str) -> None:
    """Raise a UserError that says what differs, if the two tokenizers are not the same."""
    found = differences(student, teacher)
    if found:
        raise UserError(
            f"teacher {teacher_name}: its tokenizer is not the student's, so its distribution is over other tokens: "
            + "; ".join(found)
            + ". Use a teacher and a student that share a tokenizer."
        )


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> Any:
    return tokenizer(_PROBE)["input_ids"]


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """A tokenizer by content, JSON-able: two that ``differences`` calls equal have the same facts."""

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "special_ids": {name: getattr(tokenizer, name) for name in _SPECIAL},
        "cuts": digest(list(_probe_ids(tokenizer))),
    }
