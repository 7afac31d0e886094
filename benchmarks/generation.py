"""MT-Bench's 80 x 2 turns answered in batches and one by one: seconds, and whether greedy answers are the same.

python benchmarks/novel_model.py --texts TEXTS --output MODEL
python benchmarks/generation.py --model MODEL --questions mt_bench/question.jsonl --json benchmarks/results/generation.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from daekit.evaluation.answers import AnswerStore, HowToAnswer, answer_all
from daekit.evaluation.models import SuiteModel
from daekit.evaluation.questions import mt_bench_conversations
from daekit.recipe.suite import SuiteModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory with a chat template")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    suite_model = SuiteModel("model", SuiteModelSpec(path=str(options.model)))
    suite_model.model()
    runs = {size: run(suite_model, options, size) for size in (options.batch_size, 1)}
    batched, single = runs[options.batch_size], runs[1]
    facts = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "turns": sum(len(turns) for turns in batched["answers"].values()),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "seconds_batched": batched["seconds"],
        "seconds_one_by_one": single["seconds"],
        "ratio": single["seconds"] / batched["seconds"],
        "cpu_ratio": single["cpu_seconds"] / batched["cpu_seconds"],
        "questions_answered_differently": sum(batched["answers"][key] != turns for key, turns in single["answers"].items()),
    }
    print(json.dumps(facts, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def run(suite_model: SuiteModel, options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Greedy answers to all questions."""
    conversations, _ = mt_bench_conversations(options.questions, "questions", options.limit, 0.0)
    how = HowToAnswer(options.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = AnswerStore(Path(folder), "model", {})
        start, cpu = time.perf_counter(), time.process_time()
        answer_all(suite_model, conversations, how, store, batch_size=batch_size, where="mt_bench")
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {"answers": {key: record["choices"][0]["turns"] for key, record in store.records.items()}, **times}


if __name__ == "__main__":
    main()
