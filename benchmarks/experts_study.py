"""Two experts for one student: one after the other, routed by row, as an ensemble, or merged into one teacher.

    python benchmarks/experts_study.py --data DIR --work DIR --seeds 0 1 2 --json results.json --plot results.png

For each seed: rows of three families are brought together in WORK/seed-N/data, ``experts/teachers.yaml`` and
``experts/contestants.yaml`` are run there by ``daekit train``, with the experts' weights averaged in between, and every model
is measured on the validation rows of every family. What a seed has finished is kept, so seeds can also be run one by one. The
tables are printed as Markdown. DIR holds general/ and ecommerce/ with train.jsonl and validation.jsonl; ``--small`` takes two
steps per stage and a few rows: does everything work?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from daekit.data.sources import load_source
from daekit.evaluation import EvaluationSet, ModelEvaluation, compare, evaluate_model, tokenize_rows
from daekit.evaluation.intervals import RowValues
from daekit.models.heads import teacher_log_probs
from daekit.models.loading import load_model
from daekit.models.vocabulary import vocabulary_size
from daekit.protocol import Batch, Teacher
from daekit.recipe.schema import EvaluationSpec, ModelSpec, SourceSpec
from daekit.report.contents import Row
from daekit.report.figures import COLOURS, new_figure, style_axes
from daekit.runtime.run import calibration
from daekit.teachers import EnsembleTeacher, ModelTeacher

RECIPES = Path(__file__).resolve().parent / "experts"
EXPERTS = ("numbers-expert", "shop-expert")
TEACHERS = ("teacher", "student", *EXPERTS)
CONTESTANTS = (
    "numbers-first", "numbers-then-shop", "shop-first", "shop-then-numbers", "routed",
    "ensemble", "ensemble-reference", "merged", "merged-reference", "sft",
)  # fmt: skip
_NUMBERS = ("num_to_verbal", "sum", "diff")
_GENERAL = (
    "letters_list", "first_word_letter", "second_word_letter", "orthography_starts_with", "singular_to_plural",
    "larger_animal", "taxonomy_animal", "active_to_passive", "negation", "sentiment",
)  # fmt: skip
FAMILIES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "numbers": ("general", lambda category: category.removeprefix("induction/") in _NUMBERS),
    "shop": ("ecommerce", lambda category: True),
    "general": ("general", lambda category: category.removeprefix("induction/") in _GENERAL),
}
GENERATED = ("numbers", "general")  # families with short answers
METRICS = ("nll", "exact_match")
VALIDATION_ROWS = 200
# what is compared on the same resamples: baseline -> models
PAIRS = {
    "student": ("numbers-then-shop", "shop-then-numbers", *CONTESTANTS[4:]),
    "routed": ("numbers-then-shop", "shop-then-numbers", *CONTESTANTS[5:]),
    "numbers-first": ("numbers-then-shop",),
    "shop-first": ("shop-then-numbers",),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds general/ and ecommerce/")
    parser.add_argument("--work", type=Path, required=True, help="models, rows and results of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument("--small", action="store_true", help="two steps per stage: does everything work?")
    options = parser.parse_args()
    results = {seed: run_seed(options.data, options.work / f"seed-{seed}", seed, options.small) for seed in options.seeds}
    if options.json:
        options.json.write_text(to_json(results))
    if options.plot:
        plot(results, options.plot)
    print(tables(results))


def run_seed(data: Path, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Everything of one seed; what is there already is kept."""
    results = folder / "results.json"
    if results.is_file():
        return json.loads(results.read_text())
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        for split in ("train", "validation"):
            write_rows(data, folder / "data" / f"{family}-{split}.jsonl", family, split, 400 if small else None)
    train(folder, "teachers", TEACHERS, seed, small)
    paths = {name: folder / "teachers/stages" / name / "model" for name in TEACHERS}
    paths["merged teacher"] = folder / "merged"
    merge([paths[name] for name in EXPERTS], paths["merged teacher"])
    train(folder, "contestants", CONTESTANTS, seed, small)
    paths |= {name: folder / "contestants/stages" / name / "model" for name in CONTESTANTS}
    found = {"machine": calibration()} | measure(folder, paths, 8 if small else VALIDATION_ROWS) | facts(folder)
    results.write_text(json.dumps(found))
    return found


def write_rows(data: Path, target: Path, family: str, split: str, limit: int | None) -> None:
    """The rows of a family, which a recipe cannot choose by their category, as a file of their own."""
    source, belongs = FAMILIES[family]
    with (data / source / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if belongs(row["category"])]
    target.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n" for row in rows[:limit]))


def train(folder: Path, recipe: str, stages: Sequence[str], seed: int, small: bool) -> None:
    """``daekit train`` in the folder of the seed."""
    overrides = [f"seed={seed}"] + [f"stages.{name}.trainer.max_steps=2" for name in stages if small]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES.parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "daekit", "train", str(RECIPES / f"{recipe}.yaml"), *overrides]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def merge(models: Sequence[Path], target: Path) -> None:
    """One plain model: the mean of the full weights, in float64; they began as one model, or the mean would mean nothing."""
    states = [AutoModelForCausalLM.from_pretrained(path, use_safetensors=True).state_dict() for path in models]
    mean = {key: torch.stack([s[key].double() for s in states]).mean(dim=0).to(value.dtype) for key, value in states[0].items()}
    merged = AutoModelForCausalLM.from_pretrained(models[0], use_safetensors=True)
    merged.load_state_dict(mean)
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(target)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path, paths: dict[str, Path], limit: int) -> dict[str, Any]:
    """Every model on every family: values with their intervals, and paired differences."""
    tokenizer = AutoTokenizer.from_pretrained(paths["student"])
    sets = {}
    for family in FAMILIES:
        spec = SourceSpec(domain=family, path=str(folder / "data" / f"{family}-validation.jsonl"), chat=True)
        rows = load_source(family, spec, 0)[0].shuffle(seed=0)
        some = rows.select(range(min(limit, len(rows))))
        sets[family] = tokenize_rows(some, tokenizer, source=family, domain=family, max_length=128, overlong="drop")
    evaluations = {name: evaluated(name, path, tokenizer, sets) for name, path in paths.items()}
    experts = [ModelTeacher(load_model(ModelSpec(path=str(paths[n]))), vocabulary_size(tokenizer), n) for n in EXPERTS]
    evaluations["ensemble teacher"] = ModelEvaluation(
        "ensemble teacher", {(name, name, "nll"): nll_of(EnsembleTeacher(experts), each) for name, each in sets.items()}
    )
    rows = [row for evaluation in evaluations.values() for row in evaluation.rows(1000)]
    differences = {}
    for baseline, models in PAIRS.items():
        chosen = [evaluations[name] for name in (baseline, *models)]
        # without reference domains every difference is a gain: positive is better than the baseline
        differences[baseline] = _plain(compare(chosen, baseline, reference_domains=[], rounds=1000), "_gain")
    sizes = {family: {"rows": len(each.rows), "left out": len(each.left_out)} for family, each in sets.items()}
    return {"rows": _plain(rows), "differences": differences, "validation": sizes}


def evaluated(name: str, path: Path, tokenizer: PreTrainedTokenizerBase, sets: dict[str, EvaluationSet]) -> ModelEvaluation:
    """NLL on every family, and generated answers where they are short."""
    model, parts = load_model(ModelSpec(path=str(path))), []
    for generate in (True, False):
        chosen = {family: each for family, each in sets.items() if (family in GENERATED) is generate}
        spec = EvaluationSpec(generate=generate, max_new_tokens=24, batch_size=50)
        parts.append(evaluate_model(name, model, tokenizer, chosen, spec=spec))
    return ModelEvaluation(name, parts[0].values | parts[1].values)


def nll_of(teacher: Teacher, rows: EvaluationSet) -> RowValues:
    """The NLL of a teacher that is no model, row by row."""
    total, weight = [], []
    for row in rows.rows:
        ids = torch.tensor([row.input_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch = Batch(inputs, torch.tensor([row.labels]), torch.zeros_like(ids), (rows.domain,))
        (output,) = teacher.outputs(batch)
        log_p_NV = teacher_log_probs(output, slice(None))
        total.append(-float(log_p_NV.gather(1, batch.labels_N[:, None]).sum()))
        weight.append(len(batch.labels_N))
    return RowValues(np.array(total), np.array(weight, dtype=np.float64))


def _plain(rows: Sequence[Row], suffix: str = "") -> list[list[Any]]:
    """[model, family, metric, value, low, high] of the metrics that are shown."""
    return [
        [row.model, row.domain, row.metric.removesuffix(suffix), *(round(v, 4) for v in (row.value, row.low, row.high))]
        for row in rows
        if row.metric.removesuffix(suffix) in METRICS
    ]


def facts(folder: Path) -> dict[str, Any]:
    """What each stage took: seconds, steps, and rows and kept tokens of each family; the versions of packages."""
    stages, versions = {}, {}
    for file in sorted(folder.glob("*/stages/*/stage.json")):
        done = json.loads(file.read_text())
        rows = {family: [count["rows"], count["loss_tokens"]] for family, count in done["rows"]["train"].items()}
        stages[done["stage"]] = {
            "seconds": done["seconds"],
            "steps": done["log_history"][-1]["step"],
            "rows, kept tokens": rows,
        }
        versions = done["versions"]
    return {"stages": stages, "versions": versions}


# ---- showing ---------------------------------------------------------------------------------------------------------


def tables(results: dict[int, dict[str, Any]]) -> str:
    """Values, then differences from each baseline: means over the seeds."""
    parts = [f"Mean over seeds {', '.join(map(str, results))} (least to most).", *_table(results, lambda r: r["rows"], _spread)]
    for baseline in PAIRS:
        parts += [f"\nBetter than {baseline} by (seeds whose 95% interval is above 0 / below 0):\n"]
        parts += _table(results, partial(_differences, baseline), _difference)
    return "\n".join(parts)


def _table(
    results: dict[int, dict[str, Any]], rows_of: Callable[[dict[str, Any]], list[list[Any]]], show: Callable[..., str]
) -> Iterator[str]:
    cells: dict[str, dict[tuple[str, str], list[list[float]]]] = {}
    for result in results.values():
        for model, family, metric, *numbers in rows_of(result):
            cells.setdefault(model, {}).setdefault((family, metric), []).append(numbers)
    columns = _columns()
    yield "| | " + " | ".join(f"{family}, {metric.replace('_', ' ')}" for family, metric in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for model, row in cells.items():
        yield f"| {model} | " + " | ".join(show(row[c], c[1]) if c in row else "" for c in columns) + " |"


def _columns() -> list[tuple[str, str]]:
    return [(family, metric) for metric in METRICS for family in FAMILIES if metric == "nll" or family in GENERATED]


def _spread(seeds: list[list[float]], metric: str) -> str:
    values = np.array([value for value, _, _ in seeds])
    digits, scale = (1, 100) if metric == "exact_match" else (3, 1)
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})"


def _differences(baseline: str, result: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = result["differences"][baseline]
    return rows


def _difference(seeds: list[list[float]], metric: str) -> str:
    digits, scale = (1, 100) if metric == "exact_match" else (3, 1)
    mean = scale * np.mean([value for value, _, _ in seeds])
    above, below = sum(low > 0 for _, low, _ in seeds), sum(high < 0 for *_, high in seeds)
    return f"{mean:+.{digits}f} ({above}/{below})"


def plot(results: dict[int, dict[str, Any]], target: Path) -> None:
    """One panel per family and metric: a dot per seed, a bar at their mean; dashed: the student before."""
    names = ["student", *CONTESTANTS]
    figure = new_figure(13, 3.6, "#222222")
    axes = figure.subplots(1, len(_columns()), sharey=True)
    for ax, (family, metric) in zip(axes, _columns(), strict=True):
        found = {(m, seed): v for seed, r in results.items() for m, f, k, v, *_ in r["rows"] if (f, k) == (family, metric)}
        for place, name in enumerate(names):
            values = [found[name, seed] for seed in results]
            ax.plot(values, [place] * len(values), "o", color=COLOURS[0], markersize=4, alpha=0.7)
            ax.plot([np.mean(values)], [place], "|", color=COLOURS[1], markersize=12, markeredgewidth=2)
        ax.axvline(np.mean([found["student", seed] for seed in results]), color="#888888", linewidth=1, linestyle="--")
        ax.set_title(f"{family}: {'NLL (nats)' if metric == 'nll' else 'exact match'}", fontsize=9, loc="left")
        ax.set_yticks(range(len(names)), names)
        style_axes(ax, "#222222")
    axes[0].invert_yaxis()
    figure.savefig(target, dpi=90)


def to_json(results: dict[int, dict[str, Any]]) -> str:
    """One line per list of values."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


if __name__ == "__main__":
    main()
