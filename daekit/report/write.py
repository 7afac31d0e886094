"""Writes a report as files."""

from __future__ import annotations

from pathlib import Path

from daekit.report.gain_forgetting import save_gain_forgetting_png
from daekit.report.html import render_html
from daekit.report.markdown import render_markdown
from daekit.report.rows import Report, rows_json, samples_jsonl

PLOT = "gain_forgetting.png"


def write_report(directory: Path, report: Report) -> None:
    """Write ``report.json``, ``report.md``, ``report.html``, ``samples.jsonl`` and ``gain_forgetting.png`` into
    ``directory``.

    Equal reports give equal files. The PNG exists only when there are a baseline, a gain and a forgetting to draw.
    Everything is rendered before the first file is written, and ``report.html`` is written last.
    """
    markdown_plot = None
    models = tuple(dict.fromkeys(row.model for row in report.rows))
    html = render_html(report)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PLOT).unlink(missing_ok=True)
    if report.baseline is not None and save_gain_forgetting_png(directory / PLOT, report.rows, models, report.baseline):
        markdown_plot = PLOT
    (directory / "report.json").write_text(rows_json(report.rows), encoding="utf-8")
    (directory / "samples.jsonl").write_text(samples_jsonl(report.samples), encoding="utf-8")
    (directory / "report.md").write_text(render_markdown(report, markdown_plot), encoding="utf-8")
    (directory / "report.html").write_text(html, encoding="utf-8")
