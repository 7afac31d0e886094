"""Gain on the domain against forgetting elsewhere, a curve for each method.

    python benchmarks/retention/plot.py RUN/report/report.json [ANOTHER_SEED/report/report.json ...] --plot retention.png

Reads the rows of the reports of one or more seeds, prints the table as Markdown and draws it: means over the seeds of a
contestant, with 95% intervals of Student's t over them; of one seed alone, those over rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from daekit.report import Row, read_rows
from daekit.report.figures import COLOURS, new_figure, style_axes
from daekit.runtime.sweep import mean_over_seeds

TEXT = "#222222"
LOWEST = 1e-3  # nats: an interval over three seeds may reach below zero, which no logarithm shows
KINDS = ("general", "gsm8k", "induction", "novels")
NAMES = {
    "general": "Dolly (trained on)",
    "gsm8k": "gsm8k (unseen)",
    "induction": "induction tasks (unseen)",
    "novels": "novels (unseen)",
}
# method -> its models, along its knob
METHODS = {
    "SFT on the domain": ["sft_low", "expert"],
    "weights between": ["w0.25", "w0.5", "w0.75", "expert"],
    "SFT on the mixture": ["mixture_low", "sft_mixture"],
    "labels + reference": ["labels"],
    "DAE, Dolly rows": ["dae_low", "dae_dolly"],
    "DAE, own rows": ["dae_own"],
    "expert, restored": ["restore"],
}

Figures = dict[tuple[str, str, str], list[Row]]  # of each seed


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    figures: Figures = {}
    for report in arguments.reports:
        for row in read_rows(report.read_text()):
            figures.setdefault((row.model, row.domain, row.metric), []).append(row)
    present = {model for model, _, _ in figures}
    methods = {method: [model for model in models if model in present] for method, models in METHODS.items()}
    columns = ["model", "seeds", "domain: gain in NLL", *(f"KL: {NAMES[kind]}" for kind in KINDS)]
    print("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), sep="\n")
    for model in dict.fromkeys(model for models in methods.values() for model in models):
        seeds = str(len(figures[model, "ecommerce", "nll_gain"]))
        cells = [seeds, _cell(figures, model, "ecommerce", "nll_gain")]
        print(f"| `{model}` | " + " | ".join(cells + [_cell(figures, model, kind, "kl_to_reference") for kind in KINDS]) + " |")
    draw(figures, {method: models for method, models in methods.items() if models}, arguments.plot)


def _cell(figures: Figures, model: str, domain: str, metric: str) -> str:
    rows = figures.get((model, domain, metric))
    if rows is None:
        return ""
    value, low, high = mean_over_seeds(rows)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def draw(figures: Figures, methods: dict[str, list[str]], target: Path) -> None:
    """One panel for each kind of rows: right is better, low is better; the lines are 95% intervals."""
    figure = new_figure(13, 3.8, TEXT)
    axes = figure.subplots(1, len(KINDS), sharey=True)
    for ax, kind in zip(axes, KINDS, strict=True):
        style_axes(ax, TEXT)
        for colour, (method, models) in zip(COLOURS, methods.items(), strict=False):
            gains = [mean_over_seeds(figures[model, "ecommerce", "nll_gain"])[0] for model in models]
            points = [mean_over_seeds(figures[model, kind, "kl_to_reference"]) for model in models]
            values, lows, highs = zip(*points, strict=True)
            ax.plot(gains, values, "-o", color=colour, label=method, markersize=5, linewidth=1.2)
            ax.vlines(gains, [max(low, LOWEST) for low in lows], highs, color=colour, linewidth=1)
        ax.set_yscale("log")
        ax.set_title(NAMES[kind], fontsize=10, color=TEXT)
        ax.set_xlabel("gain on the domain, nats per token", color=TEXT)
    axes[0].set_ylabel("KL to the model as it was, nats per token", color=TEXT)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), fontsize=9, frameon=False
    )
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
