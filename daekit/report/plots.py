"""Draws the plots of a report: gain against forgetting, the parts of a domain, and training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daekit.recipe.objective import DIVERGENCES
from daekit.report.contents import Row
from daekit.report.figures import COLOURS, PAGE_TEXT, Plot, line_colour, new_figure, plain, style_axes, to_svg
from daekit.report.metrics import SHARES, metric_title
from daekit.report.tables import Breakdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PARTS = 16  # of a domain that can be told apart
_PANELS = {
    "loss": "loss",
    "kl": "KL to teacher (nats)",
    **{name: f"{name.replace('_', ' ')} to teacher" for name in DIVERGENCES},
    "ce": "cross-entropy (nats)",
    "attention_kl": "attention KL (nats)",
    "hidden_cosine": "hidden states (1 - cosine)",
    "hidden_mse": "hidden states (squared error)",
}

# ---- gain and forgetting ---------------------------------------------------------------------------------------------


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
    """What is drawn: the first share of which some model forgot any (on free text all exact matches are 0), else gained any,
    and the NLL; those that were measured on both sides."""
    metrics = [m for m in (*SHARES, "nll") if _top_level(rows, f"{m}_gain") and _top_level(rows, f"{m}_forgetting")]
    moved = [
        metric
        for kind in ("forgetting", "gain")
        for metric in metrics
        if any(row.value for row in rows if row.metric == f"{metric}_{kind}")
    ]
    shares = [metric for metric in moved or metrics if metric != "nll"]
    return [*shares[:1], *(metric for metric in metrics if metric == "nll")]


def _forgetting(rows: Sequence[Row], metric: str, baseline: str) -> tuple[str, dict[str, list[Row]]]:
    """(what is drawn, model -> its forgetting); in nats it is the KL to the baseline, where that is the reference, for the NLL
    of answers that another has written falls when a model takes on their style."""
    losses = _top_level(rows, f"{metric}_forgetting")
    domains = {row.domain for of_model in losses.values() for row in of_model}
    measured = _top_level([row for row in rows if row.domain in domains], "kl_to_reference")
    if metric == "nll" and measured.keys() > losses.keys() and not any(row.value for row in measured.get(baseline, [])):
        return "KL to the baseline", measured
    return "forgetting", losses


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
    title, losses = _forgetting(rows, metric, baseline)
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
    ax.set_xlabel(f"{title} on {_names(losses)} ({unit})   ← less is better")
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
        where: Any = {"xytext": (-7 if left else 7, shift), "textcoords": "offset points", "ha": "right" if left else "left"}
        ax.annotate(plain(name), (x, y), color=colour, fontsize=9.5, fontweight="bold", **where)


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


# ---- parts of a domain -----------------------------------------------------------------------------------------------


def bars_svg(breakdown: Breakdown, models: Sequence[str]) -> Plot | None:
    """One group of bars per part, one bar per model with its 95 % interval; None where there are too many to be told apart.

    Args:
        models: All models of the report, so that a model has one colour in all plots.
    """
    if len(breakdown.parts) > _MOST_PARTS or len(breakdown.models) > len(COLOURS):
        return None
    figure = new_figure(9.8, 3.4)
    ax = figure.subplots()
    width, scale = 0.8 / len(breakdown.models), 100.0 if breakdown.metric in SHARES else 1.0
    for index, model in enumerate(breakdown.models):
        colour = COLOURS[models.index(model) % len(COLOURS)]
        label: str | None = plain(model)
        for at, part in enumerate(breakdown.parts):
            row = breakdown.cells.get((part, model))
            if row is None or not row.is_finite:
                continue
            x, value = at - 0.4 + width * (index + 0.5), scale * row.value
            ax.bar(x, value, 0.92 * width, color=colour, label=label)
            label = None  # once per model
            ax.errorbar(x, value, _spread(row, scale), fmt="none", ecolor=PAGE_TEXT, elinewidth=0.9, capsize=2)
    style_axes(ax, PAGE_TEXT)
    ax.grid(visible=False, axis="x")
    ax.set_xticks(range(len(breakdown.parts)), [plain(part) for part in breakdown.parts])
    if breakdown.metric == "judge_score":
        ax.set_ylim(0, 10)
    ax.set_ylabel(metric_title(breakdown.metric) + (" (%)" if scale == 100.0 else ""))
    if len(breakdown.models) > 1:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, labelcolor=PAGE_TEXT)
    return Plot(to_svg(figure, f"parts of {breakdown.title}"), 2)


# ---- training curves -------------------------------------------------------------------------------------------------


def curves_svg(stage: str, history: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> Plot | None:
    """Training curves of one stage as an SVG element; None if its log has nothing to draw.

    One panel each for the loss and for the parts of it that were logged, per domain where the log has domains.
    Values of evaluations during training (``eval_...``) are dashed.
    """
    panels = {name: series for name in _PANELS if (series := _series(name, history))}
    if not panels:
        return None
    figure = new_figure(3.35 * len(panels), 2.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, series) in zip(axes, panels.items(), strict=True):
        _draw_series(ax, series, domains)
        ax.set_title(_PANELS[name], fontsize=10, loc="left", color=PAGE_TEXT)
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
        look: Any = {"linestyle": "--" if evaluated else "-", "marker": "o" if len(points) == 1 or evaluated else None}
        ax.plot(steps, values, color=colour, linewidth=1.6, label=label, markersize=3, **look)
    drawn = [value for points in series.values() for _, value in points]
    if min(drawn) > 0 and max(drawn) / min(drawn) > 30:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, *drawn))
    style_axes(ax, PAGE_TEXT)
    if len(series) > 1 or any(domain for domain, _ in series):
        ax.legend(frameon=False, fontsize=8, labelcolor=PAGE_TEXT)
