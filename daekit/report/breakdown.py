"""Draws the parts of a domain, such as MT-Bench's categories, as grouped bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

from daekit.report.figures import COLOURS, PAGE_TEXT, Plot, new_figure, plain, style_axes, to_svg
from daekit.report.tables import SHARES, Breakdown, metric_title

_MOST_PARTS, _MOST_MODELS = 16, 8


def bars_svg(breakdown: Breakdown, models: Sequence[str]) -> Plot | None:
    """One group of bars per part, one bar per model with its 95 % interval; None where there are too many to be told apart.

    Args:
        models: All models of the report, so that a model has one colour in all plots.
    """
    if len(breakdown.parts) > _MOST_PARTS or len(breakdown.models) > _MOST_MODELS:
        return None
    figure = new_figure(9.8, 3.4)
    ax = figure.subplots()
    width = 0.8 / len(breakdown.models)
    scale = 100.0 if breakdown.metric in SHARES else 1.0
    for index, model in enumerate(breakdown.models):
        colour = COLOURS[models.index(model) % len(COLOURS)]
        label: str | None = plain(model)
        for at, part in enumerate(breakdown.parts):
            row = breakdown.cell(part, model)
            if row is None or not all(math.isfinite(end) for end in (row.value, row.low, row.high)):
                continue
            x, value = at - 0.4 + width * (index + 0.5), scale * row.value
            ax.bar(x, value, 0.92 * width, color=colour, label=label)
            label = None  # once per model
            spread = [[max(0.0, value - scale * row.low)], [max(0.0, scale * row.high - value)]]
            ax.errorbar(x, value, spread, fmt="none", ecolor=PAGE_TEXT, elinewidth=0.9, capsize=2)
    style_axes(ax, PAGE_TEXT)
    ax.grid(visible=False, axis="x")
    ax.set_xticks(range(len(breakdown.parts)), [plain(part) for part in breakdown.parts])
    if breakdown.metric == "judge_score":
        ax.set_ylim(0, 10)
    ax.set_ylabel(metric_title(breakdown.metric) + (" (%)" if scale == 100.0 else ""))
    if len(breakdown.models) > 1:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, labelcolor=PAGE_TEXT)
    return Plot(to_svg(figure, f"parts of {breakdown.title}"), 2)
