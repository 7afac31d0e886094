"""BLiMP with daekit and with lm-eval on the same items: seconds, CPU seconds, and whether they agree item by item.

    python benchmarks/novel_model.py --texts TEXTS --output MODEL
    python benchmarks/blimp.py --model MODEL --data BLIMP --json benchmarks/results/blimp.json

Each contestant runs in a process of its own; times are from reading the data to the accuracies, without imports and loading
the model. The direct computation takes whole logits in float64, sentences of one length at a time, without padding.
``--lm-eval-python`` names the interpreter of an environment with lm-eval 0.4.13, where this one has none. lm-eval's own
BLiMP puts a space before each sentence (``target_delimiter``) and counts a tie as right; here it gets the sentences as they
are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}}}}}
output_type: multiple_choice
validation_split: train
doc_to_text: ""
target_delimiter: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory of one JSONL file per paradigm")
    parser.add_argument("--limit", type=int, help="pairs per paradigm")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/blimp"), help="for items and task files")
    parser.add_argument("--lm-eval-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=RUNS, help="one contestant, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.run:
        print(json.dumps(RUNS[options.run](options)))
        return
    found = {}
    for name in RUNS:
        found[name] = child(options, name)
        print(name, {key: value for key, value in found[name].items() if key != "paradigms"}, flush=True)
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
        "load": os.getloadavg()[0],
        "batch_size": options.batch_size,
        "limit": options.limit,
        "time_ratio": found["lm_eval"]["seconds"] / found["ours"]["seconds"],
        "cpu_ratio": found["lm_eval"]["cpu_seconds"] / found["ours"]["cpu_seconds"],
        "agreement": agreement(options.work),
        **found,
    }
    print({key: facts[key] for key in ("time_ratio", "cpu_ratio", "agreement")})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def child(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """This script once more, for one contestant."""
    python = options.lm_eval_python if name == "lm_eval" else sys.executable
    done = subprocess.run([python, *sys.argv, "--run", name], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def agreement(work: Path) -> dict[str, Any]:
    """Ours and lm-eval's beside the direct computation, item by item."""
    direct = [json.loads(line) for line in (work / "direct.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"items": len(direct)}
    for name in ("ours", "lm_eval"):
        items = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        assert [(each["paradigm"], each["row"]) for each in items] == [(each["paradigm"], each["row"]) for each in direct]
        pairs = list(zip(items, direct, strict=True))
        differ = [abs(ours["good"] - ours["bad"] - exact["good"] + exact["bad"]) for ours, exact in pairs]
        flipped = [(ours, exact) for ours, exact in pairs if ours["correct"] != exact["correct"]]
        found[name] = {
            "largest_difference_of_margin": max(differ),
            "verdicts_that_differ": len(flipped),
            "their_largest_margin": max((abs(exact["good"] - exact["bad"]) for _, exact in flipped), default=0.0),
        }
    return found


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    start, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def result(options: argparse.Namespace, name: str, items: list[dict[str, Any]], times: dict[str, float]) -> dict[str, Any]:
    (options.work / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    paradigms: dict[str, list[bool]] = {}
    for item in items:
        paradigms.setdefault(item["paradigm"], []).append(item["correct"])
    shares = {paradigm: sum(hits) / len(hits) for paradigm, hits in paradigms.items()}
    return {"accuracy": sum(shares.values()) / len(shares), **times, "paradigms": shares}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from daekit.evaluation.likelihood import likelihood_benchmark
    from daekit.recipe.suite import MinimalPairsSpec

    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)

    def work() -> Any:
        benchmark = likelihood_benchmark("blimp", MinimalPairsSpec(path=str(options.data), limit=options.limit))
        return benchmark.measure(model, tokenizer, options.batch_size)

    measured, times = timed(work)
    return result(options, "ours", measured.items, times) | {"note": measured.notes[0]}


def lm_eval(options: argparse.Namespace) -> dict[str, Any]:
    import importlib.metadata

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = options.work / "tasks"
    folder.mkdir(exist_ok=True)
    names = [file.stem for file in sorted(options.data.glob("*.jsonl"))]
    for name in names:
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", file=options.data / f"{name}.jsonl"))
    model = HFLM(pretrained=str(options.model), batch_size=options.batch_size, device="cpu", dtype="float32")

    def work() -> Any:
        tasks = [f"local_{name}" for name in names]
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=0)

    found, times = timed(work)
    items = []
    for name in names:
        for row, sample in enumerate(sorted(found["samples"][f"local_{name}"], key=lambda each: each["doc_id"])):
            good, bad = (float(answer[0]) for answer in sample["filtered_resps"])
            items.append({"paradigm": name, "row": row, "good": good, "bad": bad, "correct": sample["acc"] == 1.0})
    return result(options, "lm_eval", items, times) | {"version": importlib.metadata.version("lm_eval")}


def direct(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    known = len(tokenizer.get_vocab())
    rows = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()][: options.limit]
        for file in sorted(options.data.glob("*.jsonl"))
    }

    def work() -> Any:
        sentences = {each[f"sentence_{kind}"] for group in rows.values() for each in group for kind in ("good", "bad")}
        ids = {text: (tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)) for text in sentences}
        lengths: dict[int, list[tuple[int, ...]]] = {}
        for sequence in sorted(set(ids.values())):
            lengths.setdefault(len(sequence), []).append(sequence)
        log_p: dict[tuple[int, ...], float] = {}
        for group in lengths.values():
            for start in range(0, len(group), 64):
                batch = torch.tensor(group[start : start + 64])
                with torch.no_grad():
                    whole = model(input_ids=batch).logits[:, :-1, :known].log_softmax(-1)
                sums = whole.gather(-1, batch[:, 1:, None]).sum(dim=(1, 2)).tolist()
                log_p |= dict(zip(group[start : start + 64], sums, strict=True))
        return [
            {
                "paradigm": name,
                "row": row,
                "good": log_p[ids[each["sentence_good"]]],
                "bad": log_p[ids[each["sentence_bad"]]],
                "correct": log_p[ids[each["sentence_good"]]] > log_p[ids[each["sentence_bad"]]],
            }
            for name, group in rows.items()
            for row, each in enumerate(group)
        ]

    items, times = timed(work)
    return result(options, "direct", items, times)


RUNS = {"ours": ours, "lm_eval": lm_eval, "direct": direct}

if __name__ == "__main__":
    main()
