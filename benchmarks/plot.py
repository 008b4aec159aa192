"""Draw the table of perplexity.py: KL to the full model against stored bits per weight.

    python benchmarks/plot.py [RESULTS.json] [OUT.svg]

One panel per model, one line per method. Readable on light and on dark pages: the background is
transparent and all text and axes are a middle grey.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

GREY = "#7f8790"
STYLES = {
    "rtn": ("RTN", "#9aa0a6", "s"),
    "awq": ("AWQ", "#d98a1f", "^"),
    "gptq": ("GPTQ", "#2f7fd6", "o"),
    "awq+gptq": ("AWQ + GPTQ", "#2e9e6b", "D"),
}


def panel(axes: Axes, model: str, rows: list[dict[str, Any]]) -> None:
    for method, (label, colour, marker) in STYLES.items():
        points = sorted(
            (row["bits_per_weight"], row["kl"], row["kl_stderr"])
            for row in rows
            if row["method"] == method and row["kl"]
        )
        if not points:
            continue
        x, y, error = (list(column) for column in zip(*points, strict=True))
        axes.errorbar(
            x, y, yerr=error, label=label, color=colour, marker=marker, markersize=4, linewidth=1.3
        )
    axes.set_yscale("log")
    axes.set_title(model, color=GREY, fontsize=11)
    axes.set_xlabel("stored bits per weight", color=GREY)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=GREY, which="both")
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path("benchmarks/results/perplexity.json")
    )
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("benchmarks/results/perplexity.svg")
    )
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))

    plt.rcParams["svg.hashsalt"] = "llmq"  # the same table gives the same file
    plt.rcParams["svg.fonttype"] = "none"
    figure, grid = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.8), squeeze=False, layout="constrained"
    )
    for axes, model in zip(grid[0], models, strict=True):
        panel(axes, model, [row for row in rows if row["model"] == model])
    grid[0][0].set_ylabel("KL(full || quantized), nats per token", color=GREY)
    grid[0][0].legend(frameon=False, labelcolor=GREY, fontsize=9)
    figure.savefig(args.out, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
