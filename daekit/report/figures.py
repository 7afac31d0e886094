"""Shared by all plots of a report: colours, the look of axes, and SVG that follows the page's font and colours."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart: seen on white and on black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
PAGE_TEXT = "#010203"  # stands for the page's own colour, and is replaced in the SVG
_PAGE_LINE = "#030201"


@dataclass(frozen=True)
class Plot:
    """An SVG element and how many panels stand side by side in it."""

    svg: str
    panels: int


def new_figure(width: float, height: float, text: str = PAGE_TEXT) -> Figure:
    """An empty figure, transparent if its text has the page's colour."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0 if text == PAGE_TEXT else 1)
    return figure


def style_axes(ax: Axes, text: str) -> None:
    """Two spines, a faint grid, small labels in the colour ``text``."""
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(line_colour(text))
    ax.tick_params(colors=text, labelsize=8.5, length=3)
    ax.grid(color=line_colour(text), linewidth=0.5, alpha=0.6)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=text, fontsize=9)


def line_colour(text: str) -> str:
    """The colour of lines that goes with text of the colour ``text``."""
    return _PAGE_LINE if text == PAGE_TEXT else "#bbbbbb"


def to_svg(figure: Figure, name: str) -> str:
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
    return text.replace(PAGE_TEXT, "currentColor").replace(_PAGE_LINE, "var(--line)")


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: ``$`` begins a formula, and a legend leaves out what begins with ``_``."""
    shown = text.replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
