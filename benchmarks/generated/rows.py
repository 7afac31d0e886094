"""The rows of the small study of generated rows: the quickstart's general tasks, split into those that the general rows cover and the others.

    python benchmarks/generated/rows.py --out ROWS

Writes ``chat.jsonl`` (three of the six tasks, in the stranger's sentences) and, of the held-out questions in the student's own
style, ``covered.jsonl`` (the same three) and ``uncovered.jsonl`` (the other three).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from daekit.data.builtin import builtin_rows

COVERED = re.compile(r"plus|^add|in order|^sort|begin and end|first and the last")  # add, sort, ends


def main() -> None:
    """Write the three files, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "chat": [row for row in builtin_rows("chat", "train") if COVERED.search(row["prompt"])],
        "covered": [row for row in builtin_rows("skills", "validation") if COVERED.search(row["prompt"])],
        "uncovered": [row for row in builtin_rows("skills", "validation") if not COVERED.search(row["prompt"])],
    }
    for name, rows in parts.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
