"""Held-out text against steps and against CPU seconds, a curve for each loss.

    python benchmarks/kd/plot.py eval/results/kd.json --plot docs/images/kd.png

The file holds, for each contestant, the steps at which it was evaluated, its NLL there (nats per token) and the CPU seconds of
its whole stage, which are dealt out evenly over its steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from daekit.report.figures import COLOURS, new_figure, style_axes

TEXT = "#222222"


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    curves = json.loads(arguments.curves.read_text())
    figure = new_figure(11, 3.8, TEXT)
    for ax, unit in zip(figure.subplots(1, 2, sharey=True), ("steps", "CPU seconds"), strict=True):
        style_axes(ax, TEXT)
        for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
            scale = 1 if unit == "steps" else curve["cpu_seconds"] / curve["steps"][-1]
            ax.plot([step * scale for step in curve["steps"]], curve["nll"], "-o", color=colour, label=name, markersize=4)
        ax.set_xlabel(unit)
    figure.axes[0].set_ylabel("held-out text, nats per token")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(arguments.plot, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
