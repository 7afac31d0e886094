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


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L: the F-measure of the longest common subsequence of words, as ``rouge_score`` counts it without stemming.

    Words are runs of ``a-z`` and ``0-9`` in lower case; 0 where either text has none.
    """
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (generated, reference))
    common = _common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one integer (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for at, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << at
    everything = (1 << len(a)) - 1
    row = everything
    for word in b:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()
