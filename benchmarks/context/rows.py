"""The rows of the study of context distillation: product questions, sorted by whether their product is trained on.

    python benchmarks/context/rows.py --data DIR --out DIR

DIR holds ecommerce/ and general/ with train.jsonl and validation.jsonl; a prompt of ecommerce is a question, and evidence on
the next line. Rows with the same evidence are one product. Of products with five questions or more the last two are held
out (``seen``), and up to four of the others are trained on (``train``); ``unseen`` are products with one question, drawn by
a seed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

TRAINED, HELD_OUT, LEAST = 4, 2, 5  # questions of a product


def main() -> None:
    """Write train, seen, seen-evidence, unseen and general as JSON lines, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    products: dict[str, dict[str, str]] = {}
    for name in ("train", "validation"):
        for row in _read(arguments.data / "ecommerce" / f"{name}.jsonl"):
            question, evidence = row["prompt"].split("\nEvidence: ", 1)
            # tables of attributes ("batteries_required: { value:false }") belong to many products
            if "{" not in evidence and not question.startswith("Question: Describe"):
                products.setdefault(evidence.strip(), {}).setdefault(question, row["completion"])
    parts: dict[str, list[dict[str, str]]] = {name: [] for name in ("train", "seen", "seen-evidence", "unseen", "general")}
    single = []
    for evidence, answers in products.items():
        rows = [_row(question, answer, evidence) for question, answer in answers.items()]
        if len(rows) >= LEAST:
            parts["train"] += rows[:-HELD_OUT][:TRAINED]
            parts["seen"] += rows[-HELD_OUT:]
        elif len(rows) == 1:
            single += rows
    rng = random.Random(0)
    parts["unseen"] = rng.sample(single, len(parts["seen"]))
    parts["seen-evidence"] = [row | {"prompt": row["teacher_prompt"]} for row in parts["seen"]]
    general = [
        row
        for row in _read(arguments.data / "general" / "validation.jsonl")
        if row["category"].startswith(("dolly", "gsm8k")) and len(row["prompt"]) + len(row["completion"]) < 500
    ]
    parts["general"] = rng.sample(general, len(parts["seen"]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


def _row(question: str, answer: str, evidence: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer, "teacher_prompt": f"{question}\nEvidence: {evidence}"}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
