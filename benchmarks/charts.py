"""What charts share: they are readable on light and on dark pages, and the same every time.

The background is transparent, and all text and axes are a middle grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#7f8790"


def line(
    axes: Axes, look: tuple[str, str, str], points: Sequence[tuple[float, float, float]]
) -> None:
    """A line through (x, y, error of y); `look` is its label, colour and marker."""
    label, colour, marker = look
    x, y, error = (list(column) for column in zip(*points, strict=True))
    axes.errorbar(
        x, y, yerr=error, label=label, color=colour, marker=marker, markersize=4, linewidth=1.3
    )


def plain(axes: Axes, x: str) -> None:
    """Grey axes, and what stands below them."""
    axes.set_xlabel(x, color=GREY)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=GREY, which="both")
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def save(figure: Figure, path: Path) -> None:
    """Write an svg; the same figure gives the same file."""
    with plt.rc_context({"svg.hashsalt": "llmq", "svg.fonttype": "none"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
