"""The embedded corpora of the quickstart: worlds in which forgetting and a change of style show in minutes on a CPU.

``skills``  six string and number tasks, answered with the bare result: the style of the teacher and of the student.
``chat``    the same tasks on other questions, answered with a sentence: general rows that somebody else's model wrote.
``shop``    the catalogue of a made-up shop: facts that nobody can guess, each asked in several phrasings.

All is drawn from fixed seeds, so that every machine and every call gives the same rows. Texts are meant for a tokenizer
with one token per word, digit and punctuation mark; words that are worked on letter by letter are therefore spelled.
Every prompt ends with a punctuation mark, so that prompt and completion fall apart into the same tokens with or without a
space between them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

from daekit.errors import UserError
from daekit.recipe.validation import BUILTIN_CORPORA

Row = dict[str, str]

SPLITS = ("train", "validation")

# Questions of each task, in the order in which they are drawn: no question is in two of these sets.
_QUESTIONS_PER_TASK = {
    ("skills", "validation"): 50,
    ("skills", "train"): 2500,
    ("chat", "validation"): 25,
    ("chat", "train"): 1500,
}


def builtin_rows(name: str, split: str) -> list[Row]:
    """Rows ``{prompt, completion, answer}`` of a split of an embedded corpus, always the same ones in the same order.

    ``answer`` is the bare result; the completion of ``skills`` and ``shop`` is nothing else, that of ``chat``
    contains it.

    Raises:
        UserError: there is no corpus or no split of that name.
    """
    if name not in BUILTIN_CORPORA:
        raise UserError(f"builtin corpus {name!r} does not exist; choose one of {', '.join(BUILTIN_CORPORA)}")
    if split not in SPLITS:
        raise UserError(f"split {split!r} of builtin:{name} does not exist; choose one of {', '.join(SPLITS)}")
    rows = _shop_rows()[split] if name == "shop" else _general_rows()[name, split]
    return [dict(row) for row in rows]


# ---- skills and chat -------------------------------------------------------------------------------------------------

# A task draws a question from a random generator: (what fills its phrasings, the bare result).
Question = tuple[tuple[str, ...], str]
_Draw = Callable[[random.Random], Question]

_VOWELS = "aeiou"
_CONSONANTS = "bdklmnprst"


def _word(rng: random.Random, letters: int) -> str:
    """A pronounceable word of consonants and vowels, spelled: ``l a m o p``."""
    first = rng.randrange(2)
    return " ".join(rng.choice(_VOWELS if (place + first) % 2 else _CONSONANTS) for place in range(letters))


def _add(rng: random.Random) -> Question:
    """Two numbers of three digits and their sum, without a carry: learnt in minutes, too many to recite."""
    totals = [rng.randint(2 if place == 0 else 0, 9) for place in range(3)]
    firsts = [rng.randint(1, total - 1) if place == 0 else rng.randint(0, total) for place, total in enumerate(totals)]
    a, total = (int("".join(map(str, digits))) for digits in (firsts, totals))
    return (str(a), str(total - a)), str(total)


def _digits(rng: random.Random, size: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(size))


def _largest(rng: random.Random) -> Question:
    number = _digits(rng, 5)
    return (number,), max(number)


def _sort(rng: random.Random) -> Question:
    number = _digits(rng, 4)
    return (number,), "".join(sorted(number))


def _reverse(rng: random.Random) -> Question:
    word = _word(rng, rng.randint(4, 6))
    return (word,), word[::-1]


def _ends(rng: random.Random) -> Question:
    word = _word(rng, rng.randint(4, 6))
    return (word,), f"{word[0]} {word[-1]}"


def _rotate(rng: random.Random) -> Question:
    word = _word(rng, rng.randint(4, 6))
    return (word,), f"{word[2:]} {word[0]}"


# task -> (draw a question, phrasings of the prompt, the sentences in which the other model answers), which | divides
_TASKS: dict[str, tuple[_Draw, str, str]] = {
    "add": (_add, "what is {0} plus {1}?|add {0} and {1}:", "it is {0}.|{0} is the sum."),
    "largest": (
        _largest,
        "which digit of {0} is the largest?|the largest digit of {0}:",
        "that would be {0}.|{0} is the largest.",
    ),
    "sort": (_sort, "put the digits {0} in order:|sort {0}:", "the order is {0}.|{0} is the order."),
    "reverse": (
        _reverse,
        "spell {0} backwards:|what is {0} in reverse?",
        "backwards it reads {0}.|{0} is what it reads backwards.",
    ),
    "ends": (
        _ends,
        "which letters begin and end {0}?|the first and the last letter of {0}:",
        "those are {0}.|{0} are the ends.",
    ),
    "rotate": (_rotate, "move the first letter of {0} to the end:|rotate {0} by one:", "you get {0}.|{0} is what you get."),
}


@lru_cache(maxsize=1)
def _general_rows() -> dict[tuple[str, str], list[Row]]:
    rng = random.Random("daekit general")
    rows: dict[tuple[str, str], list[Row]] = {key: [] for key in _QUESTIONS_PER_TASK}
    for draw, phrasings, sentences in _TASKS.values():
        seen: set[tuple[str, ...]] = set()
        for (name, split), size in _QUESTIONS_PER_TASK.items():
            for question, answer in _new_questions(draw, rng, seen, size):
                completion = rng.choice(sentences.split("|")).format(answer) if name == "chat" else answer
                prompt = rng.choice(phrasings.split("|")).format(*question)
                rows[name, split].append({"prompt": prompt, "completion": completion, "answer": answer})
    for part in rows.values():
        rng.shuffle(part)
    return rows


def _new_questions(draw: _Draw, rng: random.Random, seen: set[tuple[str, ...]], size: int) -> list[Question]:
    """``size`` questions that are not in ``seen``, to which they are added; 3 + 5 and 5 + 3 are the same question."""
    questions: list[Question] = []
    while len(questions) < size:
        question, answer = draw(rng)
        key = tuple(sorted(question))
        if key not in seen:
            seen.add(key)
            questions.append((question, answer))
    return questions


# ---- shop ------------------------------------------------------------------------------------------------------------

_PRODUCTS = (
    *("lamp", "chair", "kettle", "clock", "basket", "mirror", "shelf", "blanket", "vase", "stool"),
    *("bench", "bowl", "broom", "bucket", "candle", "carpet", "curtain", "cushion", "ladder", "pillow"),
    *("plate", "racket", "scarf", "spoon", "table", "teapot", "towel", "tray", "trunk", "wardrobe"),
)
_COLOURS = (
    *("red", "blue", "green", "white", "black", "grey", "yellow", "brown", "purple"),
    *("orange", "pink", "silver", "gold", "cream", "navy", "amber", "teal", "coral"),
)
_MATERIALS = (
    *("oak", "pine", "steel", "glass", "wool", "cotton", "clay", "brass", "cork"),
    *("linen", "bamboo", "leather", "marble", "paper", "copper", "felt", "jute", "birch"),
)
_PHRASINGS = {
    "price": "what does the {0} cost?|how much is the {0}?|price of the {0}:|how many coins for the {0}?|"
    "what must i pay for the {0}?",
    "colour": "what colour is the {0}?|which colour does the {0} have?|colour of the {0}:|in what colour do you sell the {0}?|"
    "how is the {0} painted?",
    "material": "what is the {0} made of?|which material is the {0}?|material of the {0}:|out of what do they make the {0}?|"
    "from what stuff is the {0}?",
    "aisle": "in which aisle is the {0}?|where do i find the {0}?|aisle of the {0}:|where is the {0} kept?|"
    "which aisle has the {0}?",
}


@lru_cache(maxsize=1)
def _shop_rows() -> dict[str, list[Row]]:
    """Each fact is in validation in one phrasing and in training in all others; the one kept back goes round."""
    rng = random.Random("daekit shop")
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for number, item in enumerate(_PRODUCTS):
        facts = {"price": str(rng.randint(10, 99)), "colour": rng.choice(_COLOURS)}
        facts |= {"material": rng.choice(_MATERIALS), "aisle": str(rng.randint(10, 39))}
        for place, (attribute, value) in enumerate(facts.items()):
            phrasings = _PHRASINGS[attribute].split("|")
            for index, phrasing in enumerate(phrasings):
                split = "validation" if index == (number + place) % len(phrasings) else "train"
                rows[split].append({"prompt": phrasing.format(item), "completion": value, "answer": value})
    for part in rows.values():
        rng.shuffle(part)
    return rows
