"""Plots of a report: inline SVG that follows the page's colours, and a PNG of gain against forgetting."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daekit.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart: seen on white and on black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_TEXT, _GRID = "#010203", "#030201"  # stand for the page's colours, replaced in the SVG
_PANELS = ("loss", "kl", "ce", "attention_kl")
_PANEL_TITLES = {
    "loss": "loss",
    "kl": "KL to teacher (nats)",
    "ce": "cross-entropy (nats)",
    "attention_kl": "attention KL (nats)",
}
_COMPARED = ("exact_match", "answer_match", "token_accuracy", "nll")  # the first that was measured is plotted


@dataclass(frozen=True)
class Curves:
    """An SVG element and how many panels stand side by side in it."""

    svg: str
    panels: int


def curves_svg(stage: str, history: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> Curves | None:
    """Training curves of one stage as an SVG element; None if its log has nothing to draw.

    One panel each for the loss and for ``kl``, ``ce`` and ``attention_kl``, per domain where the log has domains.
    Values of evaluations during training (``eval_...``) are dashed.
    """
    panels = {name: series for name in _PANELS if (series := _series(name, history))}
    if not panels:
        return None
    figure = _figure(3.35 * len(panels), 2.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, series) in zip(axes, panels.items(), strict=True):
        _draw_series(ax, series, domains)
        ax.set_title(_PANEL_TITLES[name], fontsize=10, loc="left", color=_TEXT)
        ax.set_xlabel("step")
    return Curves(_svg(figure, f"curves {stage}"), len(panels))


def gain_forgetting_svg(rows: Sequence[Row], models: Sequence[str], baseline: str) -> str | None:
    """One point per model with 95 % intervals: gain (up) against forgetting (to the right); None without both."""
    figure = _gain_forgetting(rows, models, baseline, _TEXT)
    return None if figure is None else _svg(figure, "gain and forgetting")


def save_gain_forgetting_png(path: Path, rows: Sequence[Row], models: Sequence[str], baseline: str) -> bool:
    """The same picture as a PNG on white; False, and no file, without both gain and forgetting."""
    figure = _gain_forgetting(rows, models, baseline, "#222222")
    if figure is None:
        return False
    figure.patch.set_facecolor("white")
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return True


def compared_metric(rows: Sequence[Row]) -> str | None:
    """The metric that gain and forgetting are drawn for: the first of _COMPARED that has both."""
    found = {row.metric for row in rows}
    return next((m for m in _COMPARED if f"{m}_gain" in found and f"{m}_forgetting" in found), None)


def _gain_forgetting(rows: Sequence[Row], models: Sequence[str], baseline: str, text: str) -> Figure | None:
    metric = compared_metric(rows)
    if metric is None:
        return None
    gains = _top_level(rows, f"{metric}_gain")
    losses = _top_level(rows, f"{metric}_forgetting")
    pairs = [(m, g, f) for m in models for g in gains.get(m, []) for f in losses.get(m, [])]
    several = len({(g.domain, f.domain) for _, g, f in pairs}) > 1
    scale, unit = (1.0, "nats per token") if metric == "nll" else (100.0, "percentage points")
    figure = _figure(6.4, 4.4, text)
    ax = figure.subplots()
    ax.axhline(0, color=_grid(text), linewidth=1, zorder=0)
    ax.axvline(0, color=_grid(text), linewidth=1, zorder=0)
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
    _style(ax, text)
    ax.margins(0.14)
    figure.draw_without_rendering()  # lays out the axes, so that points have pixels
    _label_points(ax, marks)
    ax.set_xlabel(f"forgetting on {_names(losses)} ({unit})   ← less is better")
    ax.set_ylabel(f"gain on {_names(gains)} ({unit})   more is better →")
    return figure


def _label_points(ax: Axes, marks: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name beside its point, on the side with room, above and below in turn where points coincide."""
    middle = sum(ax.get_xlim()) / 2
    placed: list[tuple[float, float, bool]] = []
    for x, y, name, colour in marks:
        left = x > middle
        pixel_x, pixel_y = ax.transData.transform((x, y))
        near = sum(1 for px, py, side in placed if side == left and abs(py - pixel_y) < 14 and abs(px - pixel_x) < 160)
        shift = 7 + 13 * (near // 2) if near % 2 == 0 else -15 - 13 * (near // 2)  # above and below, in turn
        placed.append((pixel_x, pixel_y, left))
        ax.annotate(
            _plain(name),
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
    return _plain(", ".join(dict.fromkeys(row.domain for group in rows.values() for row in group)))


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _spread(row: Row, scale: float) -> list[list[float]]:
    return [[scale * max(0.0, row.value - row.low)], [scale * max(0.0, row.high - row.value)]]


def _series(name: str, history: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """(domain or "", from an evaluation) -> (step, value) points of a metric; the total only where there are no
    domains."""
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            evaluated = key.startswith("eval_")
            metric, _, domain = key.removeprefix("eval_").partition("/")
            if metric == name and "step" in entry and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault((domain, evaluated), []).append((float(entry["step"]), float(value)))
    by_domain = {key: points for key, points in found.items() if key[0]}
    return by_domain or found


def _draw_series(ax: Axes, series: Mapping[tuple[str, bool], Sequence[tuple[float, float]]], domains: Sequence[str]) -> None:
    for (domain, evaluated), points in series.items():
        steps, values = zip(*points, strict=True)
        colour = COLOURS[domains.index(domain) % len(COLOURS)] if domain in domains else COLOURS[-1]
        origin = "evaluation" if evaluated else "training"
        label = origin if not domain else _plain(domain) if not evaluated else f"{_plain(domain)} ({origin})"
        marker = "o" if len(points) == 1 or evaluated else None
        ax.plot(
            steps,
            values,
            color=colour,
            linewidth=1.6,
            label=label,
            linestyle="--" if evaluated else "-",
            marker=marker,
            markersize=3,
        )
    drawn = [value for points in series.values() for _, value in points]
    if min(drawn) > 0 and max(drawn) / min(drawn) > 30:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, *drawn))
    _style(ax, _TEXT)
    if len(series) > 1 or any(domain for domain, _ in series):
        ax.legend(frameon=False, fontsize=8, labelcolor=_TEXT)


def _figure(width: float, height: float, text: str = _TEXT) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0 if text == _TEXT else 1)
    return figure


def _style(ax: Axes, text: str) -> None:
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_grid(text))
    ax.tick_params(colors=text, labelsize=8.5, length=3)
    ax.grid(color=_grid(text), linewidth=0.5, alpha=0.6)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(text)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)


def _grid(text: str) -> str:
    return _GRID if text == _TEXT else "#bbbbbb"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element without XML declaration, with the page's font and colours; equal figures give equal
    text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"daekit {name}"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return text.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")
