"""A sweep: one recipe run with every combination of some settings, sharing what is common, then compared in one report."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from daekit.errors import UserError, listed
from daekit.files import facts_hash
from daekit.generation import Permissions
from daekit.recipe import load_recipe, stage_key
from daekit.recipe.schema import Recipe
from daekit.report import Report, Row, format_table, read_rows, write_report
from daekit.report.provenance import commit, versions
from daekit.runtime.folders import RunFolder
from daekit.runtime.kept import ahead
from daekit.runtime.prepare import prepare
from daekit.runtime.quiet import say
from daekit.runtime.run import processes_of, run_recipe
from daekit.runtime.signals import GRACE

SEPARATOR = " · "  # between a model and its settings in the comparison
_SHARED = ("caches", "students", "generated")  # folders of a run whose entries are named by their content
_OPENS = {"[": "]", "{": "}", "'": "'", '"': '"'}
_ALL = 0.975  # quantile of a 95 % interval


@dataclass(frozen=True)
class SweptRun:
    """One combination of the settings.

    Attributes:
        settings: Key of an override -> its value here, of the keys that have several.
        recipe: The recipe with them, which writes into a folder of its own.
    """

    settings: Mapping[str, str]
    recipe: Recipe

    @property
    def knobs(self) -> dict[str, str]:
        """The settings without seeds, over which means are taken."""
        return {key: value for key, value in self.settings.items() if not _is_seed(key)}


def swept_runs(path: str, overrides: Sequence[str]) -> tuple[Path, list[SweptRun]]:
    """(directory of the sweep, its runs) of a recipe and overrides of which some have several values: ``key=1e-5,3e-5``.

    Raises:
        UserError: no override has several values; a value, or the key of several, twice; values that cannot be told apart; a
            recipe that is wrong with some of them.
    """
    choices = [_choice(override) for override in overrides]
    several = [key for key, values in choices if len(values) > 1]
    if not several:
        nothing = [f"; {key} has none" for key, values in choices if values == [""]]
        raise UserError(
            f"daekit sweep: no key has several values{''.join(nothing[:1])}; write them with commas: "
            "stages.dae.trainer.learning_rate=1e-5,3e-5"
        )
    keys = [key for key, _ in choices]
    for key, values in choices:
        if len(set(values)) < len(values):
            raise UserError(f"daekit sweep: {key} has a value twice ({listed(values)})")
        if key in several and keys.count(key) > 1:
            given = [override for override, other in zip(overrides, keys, strict=True) if other == key]
            raise UserError(f"daekit sweep: {key} is given twice ({listed(given)}); write all its values behind one")
    root, runs = Path(), []
    for combination in itertools.product(*(values for _, values in choices)):
        chosen = list(zip(keys, combination, strict=True))
        pairs = zip(overrides, chosen, strict=True)  # a single value stays as it was written
        recipe = load_recipe(path, [f"{key}={value}" if key in several else override for override, (key, value) in pairs])
        settings = {key: value for key, value in chosen if key in several}
        root, name = Path(recipe.output_dir), re.sub(r"[^\w.+-]+", "_", _label(settings))
        runs.append(SweptRun(settings, recipe.model_copy(update={"output_dir": str(root / "runs" / name)})))
    _require_different(runs)
    folders = [run.recipe.output_dir for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError(
            "daekit sweep: two combinations would share a folder; write their values so that they differ in letters or digits"
        )
    return root, runs


def _choice(override: str) -> tuple[str, list[str]]:
    """(key, values) of an override; one value is left to ``load_recipe``, which says what is wrong with it.

    Raises:
        UserError: no key and value; an empty one of several values; a bracket or quote without its other.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"daekit sweep: {override!r} is not of the form key.sub=value")
    try:
        values = _values(text)
    except ValueError as error:
        raise UserError(f"daekit sweep: {override}: {error}; write it, or put quotes around a value that holds one") from None
    if len(values) > 1 and "" in values:
        raise UserError(f"daekit sweep: {override}: one of the values between its commas is empty; remove a comma")
    return key, values


def _require_different(runs: Sequence[SweptRun]) -> None:
    """Two spellings of one value would be counted as two seeds, or two points, of what is one run."""
    seen: dict[str, SweptRun] = {}
    for run in runs:
        facts = json.dumps(run.recipe.model_dump(exclude={"name", "output_dir"}), sort_keys=True, default=str)
        if (first := seen.setdefault(facts, run)) is not run:
            raise UserError(
                f"daekit sweep: {_label(first.settings)} and {_label(run.settings)} are the same run; give each value once, "
                "and sweep only what changes it (its name and output_dir do not: each run gets a folder below the latter)"
            )


def run_sweep(root: Path, runs: Sequence[SweptRun], grace: float = GRACE, allowed: Permissions = Permissions()) -> None:
    """Run what is not complete yet, and compare. Started again it keeps what is complete and resumes what was stopped.

    Everything that any run needs is opened before the first step of the first. A stage whose result depends on nothing that is
    swept is trained once: the other runs get hard links of its files. Caches, generated rows and students made from
    teachers lie in one folder for all.

    Raises:
        UserError: what ``run_recipe`` raises, of any run.
    """
    state = processes_of(runs[0].recipe)
    waiting = [run for run in runs if ahead(run.recipe)]
    for run in waiting[1:]:  # the first is prepared when it begins; the rows of all would not lie in memory together
        say(f"[sweep] checking run {runs.index(run) + 1} of {len(runs)}: {_label(run.settings)}")
        prepare(run.recipe, allowed)
    done: dict[str, Path] = {}
    for number, run in enumerate(runs, 1):
        say(f"[sweep] run {number} of {len(runs)}: {_label(run.settings)}")
        folder = RunFolder(run.recipe.output_dir)
        if state.is_main_process:
            _share_folders(root, folder.root)
            _link_stages(run.recipe, done)
        state.wait_for_everyone()
        run_recipe(run.recipe, grace, allowed)
        done = {facts_hash(stage_key(run.recipe, name)): folder.stage(name).root for name in run.recipe.stages} | done
    if state.is_main_process and (report := compared(runs)) is not None:
        write_report(root / "report", report)
        print(f"\n{format_table(report.rows)}\n\nSweep: {root / 'report' / 'report.html'}", flush=True)


def compared(runs: Sequence[SweptRun]) -> Report | None:
    """One report over all runs: means over seeds, with 95 % intervals of Student's t over them; None without evaluation.

    With one seed a value keeps the interval of its own report, which is over rows. A model that is the same whatever is swept
    (a stage before it) is shown once.
    """
    evaluation = runs[0].recipe.evaluation
    if evaluation is None or not evaluation.sources:
        return None
    measured: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for run in runs:
        for row in read_rows((RunFolder(run.recipe.output_dir).report / "report.json").read_text(encoding="utf-8")):
            of_knobs = measured.setdefault((row.model, row.domain, row.metric), {})
            of_knobs.setdefault(_label(run.knobs), []).append(row)
    varied = set()
    for (model, *_), of_knobs in measured.items():
        if len({tuple(row.value for row in rows) for rows in of_knobs.values()}) > 1:
            varied.add(model)
    found = []
    for (model, domain, metric), of_knobs in measured.items():
        for knobs, rows in list(of_knobs.items())[: None if model in varied else 1]:
            name = f"{model}{SEPARATOR}{knobs}" if model in varied and knobs else model
            found.append(Row(name, domain, metric, *mean_over_seeds(rows), rows[0].n))
    seeds = len({tuple(value for key, value in run.settings.items() if _is_seed(key)) for run in runs})
    over = (
        f"means over {seeds} seeds, 95 % intervals of Student's t over them" if seeds > 1 else "one seed, intervals over rows"
    )
    over_seeds = "Student's t over the seeds, and where no seed changes a value from a bootstrap over rows"
    return Report(
        title=f"{runs[0].recipe.name}: sweep of {listed(runs[0].settings)}",
        rows=tuple(sorted(found, key=lambda row: list(dict.fromkeys(each.model for each in found)).index(row.model))),
        baseline=evaluation.baseline,
        notes=(f"{len(runs)} runs; {over}.", *pareto_notes(found)),
        intervals=over_seeds if seeds > 1 else "a bootstrap over rows",
        versions=versions(),
        provenance={"commit": commit()},
    )


def pareto_notes(rows: Sequence[Row]) -> list[str]:
    """For each metric with one gain and one forgetting: the models that no other beats in both."""
    notes = []
    for metric in dict.fromkeys(row.metric.removesuffix("_gain") for row in rows if row.metric.endswith("_gain")):
        gains = {row.model: row.value for row in rows if row.metric == f"{metric}_gain" and "/" not in row.domain}
        losses = {row.model: row.value for row in rows if row.metric == f"{metric}_forgetting" and "/" not in row.domain}
        points = {model: (gains[model], -losses[model]) for model in gains if model in losses}
        front = [
            model
            for model, point in points.items()
            if not any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values())
        ]
        if points:
            notes.append(f"Pareto front of {metric} (no other model gains as much and forgets as little): {'; '.join(front)}.")
    return notes


def _values(text: str) -> list[str]:
    """The values between commas that stand outside of brackets and quotes; ValueError for one of those that is not closed.

    As in YAML, a quote is one where a value begins, be it in brackets; a bracket also where it closes (``layer.[0-9]{1,2}``).
    """
    values, opened, start = [], "", 0
    begins, escaped = True, False
    for at, mark in enumerate(text):
        if escaped:
            escaped = False
        elif opened.endswith(("'", '"')):
            escaped = opened[-1] == '"' and mark == "\\"
            opened = opened.removesuffix(mark)
        elif mark in _OPENS and (begins or (mark in "[{" and _OPENS[mark] in text[at:])):
            opened += mark
        elif opened and mark in "]}":
            if _OPENS[opened[-1]] != mark:
                raise ValueError(f"it has {mark} where {opened[-1]} is open")
            opened = opened[:-1]
        elif mark == "," and not opened:
            values.append(text[start:at].strip())
            start, begins = at + 1, True
        elif mark != " ":
            begins = bool(opened) and mark in ",:"
    if opened:
        raise ValueError(f"it has {opened[-1]} without its other")
    return [*values, text[start:].strip()]


def _is_seed(key: str) -> bool:
    return key.rsplit(".", 1)[-1] == "seed"


def _label(settings: Mapping[str, str]) -> str:
    """``learning_rate=1e-5, seed=0``: keys by their last part, or whole where that is another's, too."""
    last = [key.rsplit(".", 1)[-1] for key in settings]
    names = [short if last.count(short) == 1 else key for short, key in zip(last, settings, strict=True)]
    return ", ".join(f"{name}={value}" for name, value in zip(names, settings.values(), strict=True))


def _share_folders(root: Path, output: Path) -> None:
    """Let a run find what others have made whose name is its content."""
    for name in _SHARED:
        shared, link = root / name, output / name
        shared.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(os.path.relpath(shared, output), target_is_directory=True)


def _link_stages(recipe: Recipe, done: Mapping[str, Path]) -> None:
    """Give a run the stages that another has completed and that depend on the same facts, as hard links."""
    folder = RunFolder(recipe.output_dir)
    for name in recipe.stages:
        stage, theirs = folder.stage(name), done.get(facts_hash(stage_key(recipe, name)))
        if theirs is None or stage.is_begun or theirs == stage.root:
            continue
        shutil.rmtree(stage.root, ignore_errors=True)
        half = stage.root.with_name(f".{name}.half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(theirs, half, copy_function=_link)
        half.rename(stage.root)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def mean_over_seeds(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(mean, lower and upper end of its interval) over the runs that differ in their seed alone."""
    values = np.array([row.value for row in rows])
    mean = float(values.mean())
    if len(rows) == 1 or (values == values[0]).all():  # no seed has changed it: what is left is chance of the rows
        return float(values[0]), rows[0].low, rows[0].high
    half = float(stats.t.ppf(_ALL, len(rows) - 1) * values.std(ddof=1) / math.sqrt(len(rows)))
    return mean, mean - half, mean + half
