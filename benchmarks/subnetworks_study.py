"""How many tokens does a student save that begins as a part of its teacher? Random, first-n, importance and searched starts.

    python benchmarks/subnetworks_study.py --data DIR --work DIR --seeds 0 1 --jobs 2 --json results.json --plot results.svg

In WORK: rows are cut out of the books of DIR, ``subnetworks/teacher.yaml`` is run by ``daekit train``, then a sweep of learning
rates, then ``subnetworks/students.yaml``, one run for each seed and start, with cross-entropy alone and with KD. Curves are the
trainer's own evaluations on held-out books. What is finished is kept. The tables are printed as Markdown. ``--small`` takes
two steps per stage and a small search: does everything work?
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from daekit.report.figures import COLOURS, new_figure, style_axes
from daekit.runtime.run import calibration

RECIPES = Path(__file__).resolve().parent / "subnetworks"
HELD_OUT = ("ENG18450_Disraeli", "ENG18610_Eliot", "ENG18830_Broughton", "ENG19010_Mason")
STARTS = ("random", "wide", "first", "importance", "searched")
WAYS = ("ce", "kd")
RATES = (3e-4, 1e-3, 3e-3, 9e-3)
SWEPT = {"random": "random", "importance": "cut"}  # the start that stands for a kind of start
CHARACTERS = 700  # of a row: more than the 128 tokens that are kept of it
ROWS = {"teacher": 5760, "students": 4800, "teacher-longer": 7200}
VALIDATION_ROWS = 24  # of each held-out book
SWEEP_STEPS = 128
SMALL_SEARCH = {"candidates": 4, "tokens": [256], "granularity": "coarse"}

Result = dict[str, Any]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="*.txt: one book each")
    parser.add_argument("--work", type=Path, required=True, help="rows, models and curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS, help="which are run, in this order")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--plot", type=Path, help="write the plot here (SVG or PNG)")
    parser.add_argument("--small", action="store_true", help="two steps per stage: does everything work?")
    options = parser.parse_args()
    write_rows(options.data, options.work / "data")
    run_all(options.work, options.seeds, options.starts, options.jobs, options.small)
    result = collect(options.work)
    if options.json:
        options.json.write_text(to_json(result))
    if options.plot:
        plot(result, options.plot)
    print(tables(result))


def write_rows(data: Path, target: Path) -> None:
    """Rows of the training books in random order, each part its own; rows of the held-out books."""
    target.mkdir(parents=True, exist_ok=True)
    training, validation = [], []
    for book in sorted(data.glob("*.txt")):
        text = " ".join(book.read_text(encoding="utf-8").split())
        rows = [text[start : start + CHARACTERS] for start in range(0, len(text) - CHARACTERS, CHARACTERS)]
        if book.stem in HELD_OUT:
            validation += rows[:: len(rows) // VALIDATION_ROWS][:VALIDATION_ROWS]
        else:
            training += rows
    random.Random(0).shuffle(training)
    parts = {"validation": validation}
    for name, count in ROWS.items():
        parts[name], training = training[:count], training[count:]
    for name, rows in parts.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


# ---- running ---------------------------------------------------------------------------------------------------------


def run_all(work: Path, seeds: list[int], starts: list[str], jobs: int, small: bool) -> None:
    """The teacher, the sweep, the students; each is a recipe of its own, so that they can run side by side."""
    teacher = yaml.safe_load((RECIPES / "teacher.yaml").read_text())
    train(work, teacher, 2 if small else None)
    sweeps = [sweep(start) for start in SWEPT]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda recipe: train(work, recipe, 2 if small else None), sweeps))
        rates = best_rates(work)
        students = [student(start, seed, rates) for seed in seeds for start in starts]
        list(pool.map(lambda recipe: train(work, recipe, 2 if small else None), students))


def train(work: Path, recipe: Mapping[str, Any], steps: int | None) -> None:
    """``daekit train`` in the work folder."""
    for stage in recipe["stages"].values() if steps else ():
        stage["trainer"] |= {"max_steps": steps, "eval_steps": 1}
        if "search" in stage["student"]:
            stage["student"]["search"] |= SMALL_SEARCH
    path = work / f"{recipe['output_dir']}.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES.parents[1]), os.environ.get("PYTHONPATH", "")])}
    with path.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "daekit", "train", path.name]
        subprocess.run(command, cwd=work, env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)


def sweep(start: str) -> dict[str, Any]:
    """One start with every learning rate, for fewer steps."""
    recipe = yaml.safe_load((RECIPES / "students.yaml").read_text())
    stage = yaml.safe_dump(recipe["stages"][f"{start}-ce"])
    options = {rate_name(start, rate): {"max_steps": SWEEP_STEPS, "learning_rate": rate} for rate in RATES}
    stages = {name: yaml.safe_load(stage) for name in options}
    for name, changed in options.items():
        stages[name]["trainer"] |= changed
    return recipe | {"output_dir": f"sweep-{start}", "seed": 0, "stages": stages}


def rate_name(start: str, rate: float) -> str:
    """The stage of the sweep for a rate; names have no dots."""
    return f"{start}-ce-{rate:g}".replace(".", "_")


def student(start: str, seed: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """One start with cross-entropy alone, then with KD."""
    recipe = yaml.safe_load((RECIPES / "students.yaml").read_text())
    stages = {name: stage for name, stage in recipe["stages"].items() if name.startswith(f"{start}-")}
    for stage in stages.values():
        stage["trainer"] = stage["trainer"] | {"learning_rate": rates["random" if start in ("random", "wide") else "cut"]}
    return recipe | {"output_dir": f"seed-{seed}-{start}", "seed": seed, "stages": stages}


def best_rates(work: Path) -> dict[str, float]:
    """Kind of start -> the rate with the lowest loss on the held-out books at the end of the sweep."""
    losses = {
        kind: [curve(work / f"sweep-{start}", rate_name(start, rate))[-1][1] for rate in RATES] for start, kind in SWEPT.items()
    }
    return {kind: RATES[of_kind.index(min(of_kind))] for kind, of_kind in losses.items()}


# ---- collecting ------------------------------------------------------------------------------------------------------


def curve(run: Path, stage: str) -> list[list[float]]:
    """[trained tokens, nats per token on the held-out books] of every evaluation of a stage."""
    done = json.loads((run / "stages" / stage / "stage.json").read_text())
    log, recipe = done["log_history"], yaml.safe_load((run / "recipe.yaml").read_text())
    trainer = recipe["stages"][stage]["trainer"]
    per_step = trainer["per_device_train_batch_size"] * trainer["max_length"]
    found = {entry["step"] * per_step: entry["eval_ce/novels"] for entry in log if "eval_ce/novels" in entry}
    return [[tokens, loss] for tokens, loss in sorted(found.items())]


def collect(work: Path) -> Result:
    """Every curve, and what the costs are counted from."""
    students: dict[str, dict[str, Any]] = {}
    for run in sorted(work.glob("seed-*-*")):
        if not run.is_dir():
            continue
        _, seed, start = run.name.split("-")
        made = [json.loads(file.read_text()) for file in run.glob("students/*/student.json")]
        for way in WAYS:
            stage = run / f"stages/{start}-{way}"
            if (stage / "stage.json").is_file():
                facts = {"parameters": parameters(stage / "model"), "made": made}
                students.setdefault(f"{start}-{way}", {})[seed] = facts | {"curve": curve(run, f"{start}-{way}")}
    recipe = yaml.safe_load((RECIPES / "students.yaml").read_text())["stages"]
    sweeps = {f"{start}, {rate:g}": curve(work / f"sweep-{start}", rate_name(start, rate)) for start in SWEPT for rate in RATES}
    done = json.loads((work / "teacher/stages/teacher/stage.json").read_text())
    return {
        "machine": calibration(),
        "versions": done["versions"],
        "teacher": curve(work / "teacher", "teacher-longer"),
        "teacher_parameters": parameters(work / "teacher/stages/teacher-longer/model"),
        "importance_tokens": recipe["importance-ce"]["student"]["calibration"]["tokens"],
        "sweeps": sweeps,
        "rates": best_rates(work),
        "students": students,
    }


def parameters(model: Path) -> int:
    """Parameters of a saved model with tied embeddings."""
    with safe_open(model / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def tokens_to_reach(points: list[list[float]], level: float) -> float | None:
    """Where a curve first comes down to a level, on a straight line between evaluations; None: never."""
    for (before, high), (after, low) in pairwise(points):
        if high <= level:
            return before
        if low <= level:
            return before + (after - before) * (high - level) / (high - low)
    return points[-1][0] if points[-1][1] <= level else None


def operations(result: Result, arm: str, seed: str, tokens: float) -> tuple[float, float]:
    """(of training on so many tokens, of making the student before): 6 N per trained token, 2 N per forward token."""
    start, way = arm.split("-")
    run, teacher = result["students"][arm][seed], result["teacher_parameters"]
    size = run["parameters"]
    training = (6 * size + (2 * teacher if way == "kd" else 0)) * tokens
    making = 2 * teacher * result["importance_tokens"] if start in ("importance", "searched") else 0
    if start == "searched":
        making += 2 * size * run["made"][0]["search"]["tokens"]
    return training, making


# ---- showing ---------------------------------------------------------------------------------------------------------


def tables(result: Result) -> str:
    """Curves, then what each start costs until it is where the random one ends."""
    lines = ["Perplexity on held-out books after so many trained tokens, mean over seeds:\n", *_curves(result)]
    for against in WAYS:
        lines += [
            f"\nUntil the final perplexity of random-{against} (of the same seed):\n",
            *_savings(result, f"random-{against}"),
        ]
    lines += ["\nSweep, perplexity at its end:\n", "| start, rate | perplexity |\n|---|---|"]
    lines += [f"| {name} | {math.exp(points[-1][1]):.1f} |" for name, points in result["sweeps"].items()]
    return "\n".join(lines)


def _arms(result: Result) -> list[str]:
    return [f"{start}-{way}" for way in WAYS for start in STARTS if f"{start}-{way}" in result["students"]]


def _curves(result: Result) -> Iterator[str]:
    steps = sorted(
        {int(tokens) for seeds in result["students"].values() for run in seeds.values() for tokens, _ in run["curve"]}
    )
    shown = sorted({steps[min(len(steps) - 1, place)] for place in (0, 1, 2, 4, 6, 8, len(steps) - 1)})
    yield "| start | seeds | " + " | ".join(f"{tokens // 1000}k" for tokens in shown) + " |"
    yield "|---" * (len(shown) + 2) + "|"
    for arm in _arms(result):
        runs = [dict(map(tuple, run["curve"])) for run in result["students"][arm].values()]  # type: ignore[misc]
        values = [math.exp(sum(run[tokens] for run in runs) / len(runs)) for tokens in shown]
        yield f"| {arm} | {len(runs)} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def _savings(result: Result, baseline: str) -> Iterator[str]:
    yield "| start | seed | trained tokens | fewer tokens | GFLOP: training | making it | fewer operations | making included |"
    yield "|---" * 8 + "|"
    for arm in _arms(result):
        for seed, run in result["students"][arm].items():
            ends = result["students"].get(baseline, {}).get(seed)
            if ends is None:
                continue
            end, level = ends["curve"][-1]
            all_of_it = operations(result, baseline, seed, end)[0]
            tokens = tokens_to_reach(run["curve"], level)
            if tokens is None:
                yield f"| {arm} | {seed} | not reached in {int(run['curve'][-1][0]):,} | | | | | |"
                continue
            training, making = operations(result, arm, seed, tokens)
            ratios = ((end, tokens), (all_of_it, training), (all_of_it, training + making))
            fewer, less, all_in = (f"{all_ / part:.2f}x" if part else "from the start" for all_, part in ratios)
            cost = f"{training / 1e9:,.0f} | {making / 1e9:,.0f}"
            yield f"| {arm} | {seed} | {int(tokens):,} | {fewer} | {cost} | {less} | {all_in} |"


def plot(result: Result, target: Path) -> None:
    """Perplexity against trained tokens: a panel without and one with KD, a line per seed."""
    figure = new_figure(11, 4.2, "#222222")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, way, title in zip(axes, WAYS, ("cross-entropy alone", "with KD"), strict=True):
        for colour, start in zip(COLOURS, STARTS, strict=False):
            for place, run in enumerate(result["students"].get(f"{start}-{way}", {}).values()):
                xs, ys = zip(*((tokens / 1000, math.exp(loss)) for tokens, loss in run["curve"]), strict=True)
                ax.plot(xs, ys, color=colour, alpha=0.8, label=start if place == 0 else None, linewidth=1.5)
        ax.axhline(math.exp(result["teacher"][-1][1]), color="#888888", linestyle="--", linewidth=1, label="teacher")
        ax.set_yscale("log")
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("trained tokens (thousands)")
        style_axes(ax, "#222222")
    axes[0].set_ylabel("perplexity, held-out books")
    axes[1].legend(frameon=False)
    figure.savefig(target, dpi=90)


def to_json(result: Result) -> str:
    """One line per point of a curve."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


if __name__ == "__main__":
    main()
