"""Renders a report as one HTML file that loads nothing from the network: no script, styles and plots inline."""

from __future__ import annotations

from importlib import resources
from typing import Any

from daekit.report.contents import Report, Row, group_samples
from daekit.report.figures import Plot
from daekit.report.metrics import COMPARISON, format_interval, format_seconds, format_value, metric_title, split_comparison
from daekit.report.plots import bars_svg, curves_svg, gain_forgetting_svg
from daekit.report.tables import bar_of, blocks, breakdowns, pivot, sizes_of


def render_html(report: Report) -> str:
    """The whole page. All text of the report is escaped; only the SVG of our own plots is not."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(
        value=lambda row: format_value(row.value, row.metric),
        interval=format_interval,
        bar=bar_of,
        blocks=blocks,
        percent=lambda share: f"{100 * min(1.0, max(0.0, share)):.2f}",
        verdict=_verdict,
        metric_title=metric_title,
    )
    source = resources.files("daekit").joinpath("resources/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(_context(report)) + "\n"


def _context(report: Report) -> dict[str, Any]:
    headline, baseline = pivot(report.rows), report.baseline
    seconds = {stage: format_seconds(value) for stage, value in report.seconds.items()}
    facts = [(f"time of {stage}", value) for stage, value in seconds.items()]
    return {
        "title": report.title,
        "summary": _summary(report, headline.models),
        "headline": headline,
        "baseline": baseline,
        "sizes": sizes_of(report.rows),
        "notes": report.notes,
        "intervals": report.intervals,
        "breakdowns": [(each, bars_svg(each, headline.models)) for each in breakdowns(report.rows)],
        "comparison": pivot(report.rows, COMPARISON),
        "gain_plot": baseline and gain_forgetting_svg(report.rows, headline.models, baseline),
        "curves": _curves(report),
        "seconds": seconds,
        "samples": group_samples(report.samples),
        "rows": report.rows,
        "facts": [*facts, *report.versions.items(), *report.provenance.items()],
        "recipe": report.recipe,
    }


def _summary(report: Report, models: tuple[str, ...]) -> str:
    domains = {row.domain.partition("/")[0] for row in report.rows}
    sizes = {"model": len(models), "evaluation set": len(domains)}
    counts = (f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in sizes.items())
    parts = [" on ".join(counts) if report.rows else "no evaluation"]
    if report.seconds:
        parts.append(f"trained in {format_seconds(sum(report.seconds.values()))}")
    if "daekit" in report.versions:
        parts.append(f"daekit {report.versions['daekit']}")
    return " · ".join(parts)


def _curves(report: Report) -> list[tuple[str, Plot]]:
    """(stage, plot) of the stages that have something to draw; a domain has one colour in all of them."""
    keys = {key for history in report.curves.values() for entry in history for key in entry if "/" in key}
    domains = sorted({key.partition("/")[2] for key in keys})
    drawn = ((stage, curves_svg(stage, history, domains)) for stage, history in report.curves.items())
    return [(stage, curves) for stage, curves in drawn if curves is not None]


def _verdict(row: Row) -> str:
    """CSS class of a difference: coloured only when its interval leaves out zero."""
    kind = split_comparison(row.metric)[1]
    if kind is None or not row.is_finite or row.low <= 0 <= row.high:
        return ""
    return "good" if (row.value > 0) == (kind == "gain") else "bad"
