"""Draws the training curves of one stage from the trainer's log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from daekit.report.figures import COLOURS, PAGE_TEXT, Plot, new_figure, plain, style_axes, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = ("loss", "kl", "ce", "attention_kl")
_PANEL_TITLES = {
    "loss": "loss",
    "kl": "KL to teacher (nats)",
    "ce": "cross-entropy (nats)",
    "attention_kl": "attention KL (nats)",
}


def curves_svg(stage: str, history: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> Plot | None:
    """Training curves of one stage as an SVG element; None if its log has nothing to draw.

    One panel each for the loss and for ``kl``, ``ce`` and ``attention_kl``, per domain where the log has domains.
    Values of evaluations during training (``eval_...``) are dashed.
    """
    panels = {name: series for name in _PANELS if (series := _series(name, history))}
    if not panels:
        return None
    figure = new_figure(3.35 * len(panels), 2.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, series) in zip(axes, panels.items(), strict=True):
        _draw_series(ax, series, domains)
        ax.set_title(_PANEL_TITLES[name], fontsize=10, loc="left", color=PAGE_TEXT)
        ax.set_xlabel("step")
    return Plot(to_svg(figure, f"curves {stage}"), len(panels))


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
        label = origin if not domain else plain(domain) if not evaluated else f"{plain(domain)} ({origin})"
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
    style_axes(ax, PAGE_TEXT)
    if len(series) > 1 or any(domain for domain, _ in series):
        ax.legend(frameon=False, fontsize=8, labelcolor=PAGE_TEXT)
