"""Plots the score of every candidate of a search against its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from daekit.report.figures import COLOURS, PAGE_TEXT, Plot, new_figure, style_axes, to_svg

_AXIS = {"perplexity": "perplexity", "kl": "KL to teacher (nats per token)"}


def search_svg(entries: Sequence[Mapping[str, Any]], objective: Literal["perplexity", "kl"] = "perplexity") -> Plot:
    """An SVG element: millions of parameters against perplexity (or KL), before any training of the student.

    Candidates that dropped out after an early round are faint, because they were scored on less text; the best is ringed.

    Args:
        entries: The result of ``read_log``.
    """

    def point(parameters: int, score: float) -> tuple[float, float]:
        return parameters / 1e6, math.exp(score) if objective == "perplexity" else score

    last = max(entry["round"] for entry in entries)
    finalists = [entry for entry in entries if entry["round"] == last]
    others = [entry for entry in entries if entry["round"] < last]
    figure = new_figure(5.0, 3.4)
    ax = figure.subplots()
    for kind, alpha, label in ((others, 0.25, "dropped out early"), (finalists, 0.9, "scored on all the text")):
        if kind:
            x, y = zip(*(point(entry["parameters"], entry["score"]) for entry in kind), strict=True)
            ax.scatter(x, y, s=14, color=COLOURS[0], alpha=alpha, linewidths=0, label=label)
    best = min(finalists, key=lambda entry: entry["score"])
    ax.scatter(
        *point(best["parameters"], best["score"]), s=70, facecolors="none", edgecolors=COLOURS[1], linewidths=1.6, label="best"
    )
    ax.set_xlabel("million parameters")
    ax.set_ylabel(_AXIS[objective])
    if objective == "perplexity":
        ax.set_yscale("log")
    style_axes(ax, PAGE_TEXT)
    ax.legend(frameon=False, fontsize=8, labelcolor=PAGE_TEXT)
    return Plot(to_svg(figure, "search"), 1)
