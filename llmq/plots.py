"""Plots as SVG text: pure functions of numbers, no library, no script.

Colours are CSS variables (`--ink`, `--line`, `--c0` ... `--c7`) that the page defines for light and
dark. Every mark has a `<title>`, which browsers show under the pointer and screen readers read.
Drawn 480 wide, so that text is still legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = 8
_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 14, 40
_ROW = 24  # height of one horizontal bar


def short(value: float) -> str:
    """A number for people, three digits: "0.0123", "1.2e-05", "34.5", "1234"."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
) -> str:
    """One line with dots per series of (x, y); with `log`, y <= 0 is not drawn."""
    points = [point for line in series.values() for point in line if point[1] > 0 or not log]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(min(ys) if log else min(0, *ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log)
    parts = [_grid(up), _x_ticks(across, whole=True), _labels(x_label, y_label)]
    for number, (name, line) in enumerate(series.items()):
        kept = sorted((x, y) for x, y in line if y > 0 or not log)
        places = [(across(x), up(y)) for x, y in kept]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = f"var(--c{number % COLOURS})"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
            f"<title>{escape(name)}, {short(value[0])}: {short(value[1])}</title></circle>"
            for (x, y), value in zip(places, kept, strict=True)
        ]
    return _svg(title, parts) + _legend(list(series))


def columns(values: Sequence[tuple[str, float]], *, title: str, x_label: str, y_label: str) -> str:
    """One column per (label, value >= 0), side by side."""
    if not values:
        return ""
    up = _Axis(0, max(value for _, value in values) or 1, _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(values)
    every = math.ceil(len(values) / 12)
    parts = [_grid(up), _labels(x_label, y_label)]
    for number, (label, value) in enumerate(values):
        x, y = _LEFT + number * step, up(value)
        parts.append(
            f'<rect x="{x + 0.08 * step:.1f}" y="{y:.1f}" width="{0.84 * step:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y:.1f}" fill="var(--c0)">'
            f"<title>{escape(label)}: {short(value)}</title></rect>"
        )
        if number % every == 0:
            parts.append(_text(x + step / 2, _HEIGHT - _BOTTOM + 15, label, "middle"))
    return _svg(title, parts)


def bars(values: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """Horizontal bars with the label above each: (label, value >= 0, what is written behind)."""
    if not values:
        return ""
    largest = max(value for _, value, _ in values) or 1
    parts = []
    for number, (label, value, note) in enumerate(values):
        y = 4 + number * (_ROW + 14)
        width = (_WIDTH - 90) * value / largest
        parts.append(_text(2, y + 11, label))
        parts.append(
            f'<rect x="2" y="{y + 16}" width="{max(width, 1):.1f}" height="{_ROW - 12}" rx="2" '
            f'fill="var(--c0)"><title>{escape(label)}: {escape(note)}</title></rect>'
        )
        parts.append(_text(8 + width, y + 26, note))
    return _svg(title, parts, 8 + len(values) * (_ROW + 14))


def histogram(edges: Sequence[float], counts: Sequence[float], *, title: str, x_label: str) -> str:
    """Share of the counts (n) between logarithmic edges (n + 1), without empty ends."""
    filled = [number for number, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = filled[0], filled[-1] + 1
    total = sum(counts)
    across = _Axis(edges[first], edges[last], _LEFT, _WIDTH - _RIGHT, log=True)
    up = _Axis(0, 100 * max(counts) / total, _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(up), _x_ticks(across), _labels(x_label, "% of tokens")]
    for number in range(first, last):
        left, right = across(edges[number]), across(edges[number + 1])
        share = 100 * counts[number] / total
        parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{up(share):.1f}" width="{right - left - 1:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - up(share):.1f}" fill="var(--c0)"><title>'
            f"{short(edges[number])} to {short(edges[number + 1])}: {short(share)}%</title></rect>"
        )
    return _svg(title, parts)


def scatter(
    points: Sequence[tuple[str, float, float, float | None]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """Named points (name, x, y > 0, standard error of y or None), y logarithmic."""
    if not points:
        return ""
    across = _Axis(0, 1.1 * max(p[1] for p in points), _LEFT, _WIDTH - _RIGHT)
    low = min(max(y - (error or 0), y / 2) for _, _, y, error in points)
    high = max(y + (error or 0) for _, _, y, error in points)
    up = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    parts = [_grid(up), _x_ticks(across), _labels(x_label, y_label)]
    for number, (name, x, y, error) in enumerate(points):
        colour, place = f"var(--c{number % COLOURS})", across(x)
        if error:
            ends = up(max(y - error, y / 2)), up(y + error)
            parts.append(
                f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" '
                f'stroke="{colour}"/>'
            )
        parts.append(
            f'<circle cx="{place:.1f}" cy="{up(y):.1f}" r="5" fill="{colour}">'
            f"<title>{escape(name)}: {short(x)}, {short(y)}</title></circle>"
        )
    return _svg(title, parts) + _legend([name for name, *_ in points])


class _Axis:
    """Maps values from [low, high] to places from `start` to `stop`."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False):
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, whole: bool = False) -> list[float]:
        """Round values inside the range: powers of ten, or about five equal steps."""
        if self.log:
            exponents = range(
                math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1
            )
            steps = (1,) if len(exponents) > 2 else (1, 2, 5)
            values = [
                m * 10.0**e for e in range(exponents.start - 1, exponents.stop) for m in steps
            ]
            return [v for v in values if self.low <= v <= self.high] or [self.low, self.high]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        step = max(1, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(up: _Axis) -> str:
    lines = []
    for value in up.ticks():
        y = up(value)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>' + _text(_LEFT - 5, y + 4, short(value), "end")
        )
    return "".join(lines)


def _x_ticks(across: _Axis, whole: bool = False) -> str:
    places = [(across(value), value) for value in across.ticks(whole)]
    return "".join(_text(x, _HEIGHT - _BOTTOM + 15, short(v), "middle") for x, v in places)


def _labels(x: str, y: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'<g transform="rotate(-90 11 {middle})">{_text(11, middle, y, "middle")}</g>'
    return _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x, "middle") + turned


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><i style="background:var(--c{number % COLOURS})"></i>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(title: str, parts: Sequence[str], height: float = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
