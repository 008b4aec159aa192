"""Draw the results of perplexity.py or of on_gpu.py.

    python benchmarks/plot.py [RESULTS.json] [OUT.svg]

perplexity.py: KL to the full model against stored bits per weight; one panel per model, one line
per method. on_gpu.py: speed over the dense product against rows of x; one panel per shape, one
line per kernel.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from charts import GREY, line, plain, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {
    "rtn": ("RTN", "#9aa0a6", "s"),
    "awq": ("AWQ", "#d98a1f", "^"),
    "gptq": ("GPTQ", "#2f7fd6", "o"),
    "awq+gptq": ("AWQ + GPTQ", "#2e9e6b", "D"),
}


KERNELS = {
    "ours": ("llmq", "#2f7fd6", "o"),
    "tinygemm": ("tinygemm (torch)", "#d98a1f", "^"),
    "gemlite": ("gemlite", "#2e9e6b", "D"),
    "marlin": ("Marlin", "#b0559b", "v"),
}
OTHER = ("#9aa0a6", "s")  # colour and marker of a kernel that is not listed


def quality_panel(axes: Axes, model: str, rows: list[dict[str, Any]]) -> None:
    for method, look in STYLES.items():
        points = sorted(
            (row["bits_per_weight"], row["kl"], row["kl_stderr"])
            for row in rows
            if row["method"] == method and row["kl"]
        )
        if points:
            line(axes, look, points)
    axes.set_yscale("log")
    axes.set_title(model, color=GREY, fontsize=11)
    plain(axes, "stored bits per weight")


def speed_panel(axes: Axes, shape: str, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "dense"):
        label, colour, marker = KERNELS.get(name, (name, *OTHER))
        points = sorted((row["M"], row["over_dense"]) for row in rows if row["name"] == name)
        x, y = (list(column) for column in zip(*points, strict=True))
        axes.plot(x, y, label=label, color=colour, marker=marker, markersize=4, linewidth=1.3)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_title(shape, color=GREY, fontsize=11)
    plain(axes, "rows of x")


def quality(rows: list[dict[str, Any]]) -> Figure:
    """The figure of perplexity.py."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = panels(len(models))
    for axes, model in zip(grid, models, strict=True):
        quality_panel(axes, model, [row for row in rows if row["model"] == model])
    grid[0].set_ylabel("KL(full || quantized), nats per token", color=GREY)
    return figure


def speed(rows: list[dict[str, Any]]) -> Figure:
    """The figure of on_gpu.py: bf16, 4 bits, symmetric, groups of 128.

    Raises:
        SystemExit: nothing has been timed.
    """
    timed = [
        row
        for row in rows
        if row["kind"] == "time"
        and "error" not in row
        and (row["dtype"], row["group"], row["symmetric"]) == ("bfloat16", 128, True)
    ]
    if not timed:
        raise SystemExit("These results hold no times.")
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in timed))
    figure, grid = panels(len(shapes))
    for axes, (N, K) in zip(grid, shapes, strict=True):
        here = [row for row in timed if (row["N"], row["K"]) == (N, K)]
        speed_panel(axes, f"{N} x {K}", here)
    grid[0].set_ylabel("times as fast as the bf16 product", color=GREY)
    return figure


def panels(count: int, across: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `across` in a row."""
    wide = min(count, across)
    high = -(-count // across)
    figure, grid = plt.subplots(
        high, wide, figsize=(4.2 * wide, 3.8 * high), squeeze=False, layout="constrained"
    )
    every = list(grid.flat)
    for empty in every[count:]:
        empty.remove()
    return figure, every[:count]


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
    figure = speed(rows) if "kind" in rows[0] else quality(rows)
    lines = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    figure.axes[0].legend(lines.values(), lines.keys(), frameon=False, labelcolor=GREY, fontsize=9)
    save(figure, args.out)


if __name__ == "__main__":
    main()
