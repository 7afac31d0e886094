"""Draws gain on the domains against forgetting elsewhere, one point per model, for the page and as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daekit.report.contents import Row
from daekit.report.figures import COLOURS, PAGE_TEXT, Plot, line_colour, new_figure, plain, style_axes, to_svg
from daekit.report.tables import SHARES, metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gain_forgetting_svg(rows: Sequence[Row], models: Sequence[str], baseline: str) -> Plot | None:
    """One point per model with 95 % intervals: gain (up) against forgetting (to the right); None without both."""
    figure = gain_forgetting_figure(rows, models, baseline, PAGE_TEXT)
    return None if figure is None else Plot(to_svg(figure, "gain and forgetting"), len(figure.axes))


def save_gain_forgetting_png(path: Path, rows: Sequence[Row], models: Sequence[str], baseline: str) -> bool:
    """The same picture as a PNG on white; False, and no file, without both gain and forgetting."""
    figure = gain_forgetting_figure(rows, models, baseline, "#222222")
    if figure is None:
        return False
    figure.patch.set_facecolor("white")
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return True


def drawn_metrics(rows: Sequence[Row]) -> list[str]:
    """What is drawn: the first share that some model gained or forgot any of (all exact matches are 0 on free text), and
    the NLL; those that were measured on both sides."""
    metrics = [m for m in (*SHARES, "nll") if _top_level(rows, f"{m}_gain") and _top_level(rows, f"{m}_forgetting")]
    moved = [m for m in metrics if any(row.value for row in rows if row.metric in (f"{m}_gain", f"{m}_forgetting"))]
    shares = [metric for metric in moved or metrics if metric != "nll"]
    return [*shares[:1], *(metric for metric in metrics if metric == "nll")]


def gain_forgetting_figure(rows: Sequence[Row], models: Sequence[str], baseline: str, text: str) -> Figure | None:
    """The picture with text of the colour ``text``: a panel per drawn metric, the baseline at the origin."""
    metrics = drawn_metrics(rows)
    if not metrics:
        return None
    figure = new_figure(6.2 * len(metrics), 4.4, text)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    marks = [_draw(ax, metric, rows, models, baseline, text) for ax, metric in zip(axes, metrics, strict=True)]
    figure.draw_without_rendering()  # lays out the axes, so that points have pixels
    for ax, its_marks in zip(axes, marks, strict=True):
        _label_points(ax, its_marks)
    return figure


def _draw(
    ax: Axes, metric: str, rows: Sequence[Row], models: Sequence[str], baseline: str, text: str
) -> list[tuple[float, float, str, str]]:
    """Draw the points of one metric; returns (x, y, name, colour) of each."""
    gains = _top_level(rows, f"{metric}_gain")
    losses = _top_level(rows, f"{metric}_forgetting")
    pairs = [(m, g, f) for m in models for g in gains.get(m, []) for f in losses.get(m, [])]
    several = len({(g.domain, f.domain) for _, g, f in pairs}) > 1
    scale, unit = (1.0, "nats per token") if metric == "nll" else (100.0, "percentage points")
    ax.axhline(0, color=line_colour(text), linewidth=1, zorder=0)
    ax.axvline(0, color=line_colour(text), linewidth=1, zorder=0)
    ax.plot([0], [0], marker="D", markersize=6, color=text, linestyle="none")
    marks = [(0.0, 0.0, baseline, text)]
    for model, gain, lost in pairs:
        x, y = scale * lost.value, scale * gain.value
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        colour = COLOURS[models.index(model) % len(COLOURS)]
        spread_x, spread_y = _spread(lost, scale), _spread(gain, scale)
        ax.errorbar(x, y, spread_y, spread_x, fmt="o", color=colour, markersize=7, capsize=3, linewidth=1.3)
        marks.append((x, y, f"{model} ({gain.domain} / {lost.domain})" if several else model, colour))
    style_axes(ax, text)
    ax.margins(0.14)
    ax.set_title(metric_title(metric), fontsize=11, loc="left", color=text)
    ax.set_xlabel(f"forgetting on {_names(losses)} ({unit})   ← less is better")
    ax.set_ylabel(f"gain on {_names(gains)} ({unit})   more is better →")
    return marks


def _label_points(ax: Axes, marks: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name beside its point, on the side with room, above and below in turn where points coincide."""
    middle = sum(ax.get_xlim()) / 2
    placed: list[tuple[float, float, bool]] = []
    for x, y, name, colour in marks:
        left = x > middle
        pixel_x, pixel_y = ax.transData.transform((x, y))
        near = sum(1 for px, py, side in placed if side == left and abs(py - pixel_y) < 14 and abs(px - pixel_x) < 100)
        shift = 7 + 13 * (near // 2) if near % 2 == 0 else -15 - 13 * (near // 2)  # above and below, in turn
        placed.append((pixel_x, pixel_y, left))
        ax.annotate(
            plain(name),
            (x, y),
            xytext=(-7 if left else 7, shift),
            textcoords="offset points",
            ha="right" if left else "left",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
        )


def _top_level(rows: Sequence[Row], metric: str) -> dict[str, list[Row]]:
    """Model -> its rows of ``metric``, without those of single sources of a domain (``general/skills``)."""
    domains = {row.domain for row in rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        of_one_source = any(row.domain.startswith(f"{other}/") for other in domains)
        if row.metric == metric and not of_one_source:
            found.setdefault(row.model, []).append(row)
    return found


def _names(rows: Mapping[str, Sequence[Row]]) -> str:
    return plain(", ".join(dict.fromkeys(row.domain for group in rows.values() for row in group)))


def _spread(row: Row, scale: float) -> list[list[float]]:
    return [[scale * max(0.0, row.value - row.low)], [scale * max(0.0, row.high - row.value)]]
