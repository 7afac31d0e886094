"""Renders a report as Markdown, for a repository or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from daekit.report.contents import Report, Row, group_samples
from daekit.report.metrics import COMPARISON, format_interval, format_seconds, format_value, metric_title
from daekit.report.tables import Breakdown, Pivot, breakdowns, pivot, sizes_of

_SHOWN_SAMPLES = 5  # per domain; all of them are in the HTML, in full
_SHOWN_CHARACTERS = 300


def render_markdown(report: Report, plot: str | None) -> str:
    """The whole report; ``plot`` is the file name of the picture of gain and forgetting beside it."""
    headline, comparison = pivot(report.rows), pivot(report.rows, COMPARISON)
    parts = [f"# {_escape(report.title)}"]
    if headline.columns:
        sizes = "; ".join(f"{domain}: n = {n}" for domain, n in sizes_of(report.rows).items())
        parts += [
            _matrix(headline),
            f"95 % intervals from {report.intervals} ({_escape(sizes)}). Bold: best value of a column. An interval of no width "
            "means that all rows agree: with n rows the value may still be off by about 3/n.",
        ]
    if report.baseline is not None and comparison.columns:
        parts += [
            f"## Gain and forgetting against {_escape(report.baseline)}",
            *([f"![gain against forgetting]({plot})"] if plot else []),
            _matrix(comparison),
            "Differences on the same rows, with 95 % intervals of a paired bootstrap. A gain is positive where the model is "
            "better than the baseline, forgetting is positive where it is worse.",
        ]
    for breakdown in breakdowns(report.rows):
        parts += [f"## {_escape(breakdown.title)}", _breakdown(breakdown)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in report.notes)]
    parts += _samples(report)
    if report.rows:
        lines = [
            [_escape(row.model), _escape(row.domain), _escape(metric_title(row.metric)), *_cells(row), str(row.n)]
            for row in report.rows
        ]
        parts += ["## All values", _table(["model", "domain", "metric", "value", "95 % interval", "n"], lines)]
    parts += _provenance(report)
    return "\n\n".join(parts) + "\n"


def _matrix(table: Pivot) -> str:
    """Models down, columns across; the best value of a column is bold."""
    lines = []
    for model in table.models:
        line = [_escape(model)]
        for column in table.columns:
            value, interval = _cells(table.cells.get((model, column)))
            strong = "**" if model in table.best[column] else ""
            line.append(f"{strong}{value}{strong} {interval}".strip())
        lines.append(line)
    return _table(["model", *(_escape(f"{column.heading}: {column.title}") for column in table.columns)], lines)


def _breakdown(breakdown: Breakdown) -> str:
    """Parts down, models across."""
    lines = [
        [_escape(part), *(" ".join(_cells(breakdown.cells.get((part, model)))).strip() for model in breakdown.models)]
        for part in breakdown.parts
    ]
    return _table(["", *map(_escape, breakdown.models)], lines)


def _samples(report: Report) -> list[str]:
    parts = ["## Sample answers"] if report.samples else []
    for domain, groups in group_samples(report.samples).items():
        for group in groups[:_SHOWN_SAMPLES]:
            reference, prompt = group[0].reference, group[0].prompt
            judged = all(s.exact_match is None for s in group)
            lines = [["*reference*", _short(reference), ""]] if reference else []
            lines += [[_escape(s.model), _short(s.generated), "✓" if s.exact_match else _escape(s.mark)] for s in group]
            head = ["", "answer", "judge" if judged else "exact"]
            parts += [f"**{_escape(domain)}**: {_short(prompt)}", _table(head, lines)]
    return parts


def _provenance(report: Report) -> list[str]:
    facts = [(f"seconds: {stage}", format_seconds(seconds)) for stage, seconds in report.seconds.items()]
    facts += [*report.versions.items(), *report.provenance.items()]
    parts = ["## Provenance"] if facts or report.recipe else []
    if facts:
        parts.append(_table(["what", "value"], [[_escape(name), _escape(value)] for name, value in facts]))
    if report.recipe:
        # a fence longer than any inside, so that no recipe can close it
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", report.recipe))])
        parts.append(f"<details><summary>Settings</summary>\n\n{fence}yaml\n{report.recipe.rstrip()}\n{fence}\n\n</details>")
    return parts


def _cells(row: Row | None) -> list[str]:
    return ["", ""] if row is None else [format_value(row.value, row.metric), format_interval(row)]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rendered = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rendered)


def _short(text: str) -> str:
    return _escape(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " […]")


def _escape(text: str) -> str:
    """Text in one line that Markdown shows as it is; ``$`` would begin a formula on some pages."""
    flat = " ".join(text.split())
    flat = re.sub(r"([\\`*_~\[\]|#$])", r"\\\1", flat)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
