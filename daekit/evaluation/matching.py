"""Does a generated answer say what was asked for?"""

from __future__ import annotations

import re


def exact_match(generated: str, reference: str) -> bool:
    """The same text, but for white space at the ends."""
    return generated.strip() == reference.strip()


def answer_match(generated: str, answer: str) -> bool:
    """Whether ``answer`` occurs in ``generated`` as whole words, in any case and with any white space between its
    words.

    A number counts only as that number: ``5`` is neither in ``15`` nor in ``-5``, ``2.5`` or ``5,000``.
    """
    words = answer.split()
    if not words:
        raise ValueError("answer_match: the answer is empty, and would be found in every text")
    before, after = r"(?<!\w)", r"(?!\w)"
    if words[0][0].isdigit():
        before += r"(?<!\d[.,])(?<!\s[-−])(?<!^[-−])"
    if words[-1][-1].isdigit():
        after += r"(?![.,]\d)"
    pattern = before + r"\s+".join(map(re.escape, words)) + after
    return re.search(pattern, generated.strip(), re.IGNORECASE) is not None
