"""The rows of the studies of generated rows, of retention and of KD on SmolLM2.

    python benchmarks/generated/rows.py --out ROWS [--data DATA]

In the small: ``chat.jsonl`` (three of the quickstart's six general tasks, in the stranger's sentences) and, of the held-out
questions in the student's own style, ``covered.jsonl`` (the same three) and ``uncovered.jsonl`` (the other three).

With DATA, a directory with ecommerce/ and general/ (train.jsonl, validation.jsonl, a column ``category`` in general) and
novels/ (text files), also those of SmolLM2: ``shop``, ``dolly`` to train on, ``shop-held-out``, ``dolly-held-out``, and
``gsm8k``, ``induction``, ``novels``, which nobody trains on there; and for KD running text of the novels, ``text``, with
``text-held-out`` of four books that ``text`` does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from daekit.data.builtin import builtin_rows

COVERED = re.compile(r"plus|^add|in order|^sort|begin and end|first and the last")  # add, sort, ends
LONGEST = 600  # characters of a row that SmolLM2 is measured on: under 256 tokens
HELD_OUT = ("ENG18450_Disraeli", "ENG18610_Eliot", "ENG18830_Broughton", "ENG19010_Mason")  # books
PIECE, PIECES = 1000, 10  # characters of a row of text; rows of each book that is held out


def main() -> None:
    """Write the files, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = _small() | (_real(arguments.data) if arguments.data else {})
    for name, rows in parts.items():
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


def _small() -> dict[str, list[dict[str, str]]]:
    held_out = builtin_rows("skills", "validation")
    return {
        "chat": [row for row in builtin_rows("chat", "train") if COVERED.search(row["prompt"])],
        "covered": [row for row in held_out if COVERED.search(row["prompt"])],
        "uncovered": [row for row in held_out if not COVERED.search(row["prompt"])],
    }


def _real(data: Path) -> dict[str, list[dict[str, str]]]:
    general, held_out = _read(data / "general" / "train.jsonl"), _read(data / "general" / "validation.jsonl")
    rng = random.Random(0)
    books = {path.stem: path.read_text(errors="replace") for path in sorted((data / "novels").glob("*.txt"))}
    texts = list(books.values())
    starts = [rng.randrange(len(text) // 2) for text in texts]
    return {
        "shop": _pairs(_read(data / "ecommerce" / "train.jsonl")),
        "shop-held-out": _pairs(_read(data / "ecommerce" / "validation.jsonl"), rng),
        "dolly": _pairs([row for row in general if row["category"].startswith("dolly")]),
        **{
            name: _pairs([row for row in held_out if row["category"].startswith(family)], rng)
            for name, family in (("dolly-held-out", "dolly"), ("gsm8k", "gsm8k"), ("induction", "induction"))
        },
        "novels": [
            {"text": " ".join(text[start:].split(" ", 1)[1][:LONGEST].split())}
            for text, start in zip(texts, starts, strict=True)
        ],
        **_running_text(books),
    }


def _running_text(books: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    rows = {}
    for name, text in books.items():
        words = " ".join(text.split())
        rows[name] = [{"text": words[start : start + PIECE]} for start in range(0, len(words) - PIECE, PIECE)]
    training = [row for name, pieces in rows.items() if name not in HELD_OUT for row in pieces]
    random.Random(1).shuffle(training)
    held_out = [row for name in HELD_OUT for row in rows[name][:: len(rows[name]) // PIECES][:PIECES]]
    return {"text": training, "text-held-out": held_out}


def _pairs(rows: list[dict[str, Any]], shuffled: random.Random | None = None) -> list[dict[str, str]]:
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    if shuffled is None:
        return pairs
    shuffled.shuffle(pairs)
    return [pair for pair in pairs if len(pair["prompt"]) + len(pair["completion"]) <= LONGEST]


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:  # not splitlines(): a text may hold U+2028
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
