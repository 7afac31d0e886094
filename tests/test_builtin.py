"""The embedded corpora: what they promise is recomputed here from the texts alone."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from daekit.data.builtin import SPLITS, builtin_rows
from daekit.errors import UserError
from daekit.recipe.validation import BUILTIN_CORPORA

GENERAL = [(name, split) for name in ("skills", "chat") for split in SPLITS]
EVERYTHING = [(name, split) for name in BUILTIN_CORPORA for split in SPLITS]

# phrasing -> (task, the right answer, recomputed)
SKILLS: list[tuple[str, str, Callable[..., str]]] = [
    (r"what is (\d+) plus (\d+)\?|add (\d+) and (\d+):", "add", lambda a, b: str(int(a) + int(b))),
    (r"which digit of (.+) is the largest\?|the largest digit of (.+):", "largest", lambda d: str(max(map(int, d)))),
    (r"put the digits (.+) in order:|sort (.+):", "sort", lambda digits: "".join(sorted(digits))),
    (r"spell (.+) backwards:|what is (.+) in reverse\?", "reverse", lambda word: " ".join(reversed(word.split()))),
    (
        r"which letters begin and end (.+)\?|the first and the last letter of (.+):",
        "ends",
        lambda word: f"{word[0]} {word[-1]}",
    ),
    (
        r"move the first letter of (.+) to the end:|rotate (.+) by one:",
        "rotate",
        lambda word: " ".join(word.split()[1:] + word.split()[:1]),
    ),
]

# attribute -> what each of its phrasings contains, and no phrasing of another attribute does
ATTRIBUTES = {
    "price": r"cost|how much|price|coins|pay",
    "colour": r"colour|painted",
    "material": r"made of|material|out of what|stuff",
    "aisle": r"aisle|where",
}


def read_skill(prompt: str) -> tuple[str, tuple[str, ...], str]:
    """(task, its question with the order of its parts forgotten, the right answer) of a prompt of skills or chat."""
    for pattern, task, solve in SKILLS:
        if match := re.fullmatch(pattern, prompt):
            parts = [part for part in match.groups() if part is not None]
            return task, tuple(sorted(parts)), solve(*parts)
    raise AssertionError(f"no known task: {prompt}")


def read_shop(prompt: str) -> tuple[str, str, str]:
    """(item, attribute, phrasing) of a prompt of shop."""
    item = re.search(r"\bthe (\w+)", prompt)
    assert item, prompt
    matching = [name for name, pattern in ATTRIBUTES.items() if re.search(pattern, prompt.replace(item[1], ""))]
    assert len(matching) == 1, prompt
    return item[1], matching[0], prompt.replace(item[1], "{}")


@pytest.mark.parametrize(("name", "split"), GENERAL)
def test_answers_of_the_skills_are_right(name: str, split: str) -> None:
    rows = builtin_rows(name, split)
    assert rows
    for row in rows:
        assert row["answer"] == read_skill(row["prompt"])[2], row


def test_no_question_is_in_two_of_the_general_sets() -> None:
    owner: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    for key in GENERAL:
        for row in builtin_rows(*key):
            task, question, _ = read_skill(row["prompt"])
            assert (task, question) not in owner, f"{row['prompt']}: {owner[task, question]} and {key}"
            owner[task, question] = key


def test_every_split_holds_every_task_equally_often_in_every_phrasing() -> None:
    for key in GENERAL:
        rows = builtin_rows(*key)
        tasks = Counter(read_skill(row["prompt"])[0] for row in rows)
        assert len(tasks) == 6
        assert len(set(tasks.values())) == 1
        assert len({re.sub(r"\d+|\b[a-z]\b", "", row["prompt"]).replace(" ", "") for row in rows}) == 12


def test_chat_answers_the_same_tasks_in_another_manner() -> None:
    assert all(row["completion"] == row["answer"] for split in SPLITS for row in builtin_rows("skills", split))
    for split in SPLITS:
        for row in builtin_rows("chat", split):
            assert row["completion"] != row["answer"]
            assert row["completion"].endswith(".")  # a sentence, whatever it begins with
            assert len(re.findall(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", row["completion"])) == 1


def test_each_shop_fact_is_asked_in_a_phrasing_not_seen_for_it() -> None:
    seen, values = defaultdict(set), defaultdict(set)
    asked = []
    for split in SPLITS:
        for row in builtin_rows("shop", split):
            item, attribute, phrasing = read_shop(row["prompt"])
            assert row["completion"] == row["answer"]
            values[item, attribute].add(row["answer"])
            if split == "train":
                seen[item, attribute].add(phrasing)
            else:
                asked.append(((item, attribute), phrasing))
    assert len(asked) == len(values) == len({fact for fact, _ in asked})
    assert all(len(answers) == 1 for answers in values.values())
    every_phrasing = {phrasing for phrasings in seen.values() for phrasing in phrasings}
    for fact, phrasing in asked:
        assert phrasing not in seen[fact]
        assert phrasing in every_phrasing
        assert len(seen[fact]) == 4
    assert {phrasing for _, phrasing in asked} == every_phrasing


def test_shop_facts_cannot_be_guessed() -> None:
    by_attribute = defaultdict(list)
    for row in builtin_rows("shop", "validation"):
        by_attribute[read_shop(row["prompt"])[1]].append(row["answer"])
    guessed = sum(Counter(answers).most_common(1)[0][1] for answers in by_attribute.values())
    assert guessed < 0.15 * len(builtin_rows("shop", "validation"))


@pytest.mark.parametrize(("name", "split"), EVERYTHING)
def test_texts_suit_a_tokenizer_of_words(name: str, split: str) -> None:
    for row in builtin_rows(name, split):
        assert set(row) == {"prompt", "completion", "answer"}
        assert row["prompt"][-1] in "?:"
        assert all(text == " ".join(text.split()) and text == text.lower() for text in row.values())


def test_vocabulary_is_small_and_all_of_it_is_in_training() -> None:
    words: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, split in EVERYTHING:
        for row in builtin_rows(name, split):
            words[split] |= set(re.findall(r"\d|\w+|[^\w\s]", f"{row['prompt']} {row['completion']}".replace("_", " ")))
    assert words["validation"] <= words["train"]
    assert len(words["train"]) < 250


def digest() -> str:
    return hashlib.sha256(json.dumps([builtin_rows(*key) for key in EVERYTHING]).encode()).hexdigest()


def test_rows_are_the_same_in_every_process_whatever_the_global_generator_did() -> None:
    program = "import random, sys; random.seed(7); sys.path.insert(0, sys.argv[1]); import test_builtin as t; print(t.digest())"
    other = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        env={"PYTHONHASHSEED": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest()


def test_reading_neither_moves_the_global_generator_nor_shares_rows() -> None:
    state = random.getstate()
    first = builtin_rows("shop", "train")
    first[0]["prompt"] = "changed"
    assert builtin_rows("shop", "train")[0]["prompt"] != "changed"
    assert random.getstate() == state


@pytest.mark.parametrize(("name", "split", "named"), [("shops", "train", "skills, chat, shop"), ("shop", "test", "train")])
def test_unknown_names_are_answered_with_the_known_ones(name: str, split: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        builtin_rows(name, split)
