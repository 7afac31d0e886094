"""Writes the files of a report."""

from __future__ import annotations

from pathlib import Path

from daekit.files import write_whole
from daekit.report.contents import Report, rows_json, samples_jsonl
from daekit.report.html import render_html
from daekit.report.markdown import render_markdown
from daekit.report.plots import save_gain_forgetting_png

PLOT = "gain_forgetting.png"


def write_report(directory: Path, report: Report) -> None:
    """Write ``report.json``, ``report.md``, ``report.html``, ``samples.jsonl`` and ``gain_forgetting.png`` into ``directory``.

    Equal reports give equal files. The PNG exists only where there are a baseline, a gain and a forgetting to draw. All text is
    made before the first file is written, and ``report.html`` is written last.
    """
    models = tuple(dict.fromkeys(row.model for row in report.rows))
    html, rows, samples = render_html(report), rows_json(report.rows), samples_jsonl(report.samples)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PLOT).unlink(missing_ok=True)
    drawn = report.baseline is not None and save_gain_forgetting_png(directory / PLOT, report.rows, models, report.baseline)
    markdown = render_markdown(report, PLOT if drawn else None)
    for name, text in (("report.json", rows), ("samples.jsonl", samples), ("report.md", markdown), ("report.html", html)):
        # half a surrogate pair, which a model may write, has no UTF-8: it is written as its escape, in JSON the right one
        write_whole(directory / name, text.encode(errors="backslashreplace"))
