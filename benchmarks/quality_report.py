"""What the table of quality.py says: ratios over all models and texts, and a plot.

A ratio is taken setting by setting (model, text, groups, symmetry) and then averaged
geometrically. "Best" among peers is taken in every setting anew, so that llmq is held against
whichever of their settings happens to win there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GPTQ_PEERS = ("gptqmodel", "llmcompressor")
PEERS = (*GPTQ_PEERS, "autoround")
# (who, against whom, their bits if not the same, bits: limit of KL, limit of wall seconds)
BARS: tuple[tuple[str, tuple[str, ...], int | None, dict[float, float], float | None], ...] = (
    ("llmq balanced", GPTQ_PEERS, None, {4: 0.60, 3: 0.60, 2: 0.45}, 2.0),
    ("llmq balanced", ("autoround",), None, {4: 1.05, 3: 1.05}, 0.1),
    ("llmq best", ("autoround",), None, {4: 0.85, 3: 0.85, 2: 0.85}, 1.0),
    ("llmq balanced mixed", PEERS, 4, {3.5: 1.0}, None),
    ("llmq balanced mixed", GPTQ_PEERS, None, {4: 0.40, 3: 0.40}, None),
    ("llmq best mixed", PEERS, 4, {3.5: 1.0}, None),
    ("llmq best mixed", GPTQ_PEERS, None, {4: 0.40, 3: 0.40}, None),
)
CLOSED = {4: 0.75, 3: 0.75, 2: 0.90}  # share of the gap in log-perplexity from RTN to full
KEYS = ("model", "calibration", "text", "bits", "group_size", "name")
CLOSED_KEYS = ("model", "calibration", "bits", "group_size", "symmetric", "name")
STYLES = {
    "llmq best": ("llmq best", "#12633f", "o"),
    "llmq balanced": ("llmq balanced", "#2e9e6b", "o"),
    "llmq fast": ("llmq fast", "#2f7fd6", "o"),
    "llmq gptq": ("llmq gptq", "#8fbbe8", "o"),
    "llmq balanced mixed": ("llmq balanced, mixed widths", "#7a4fc9", "D"),
    "gptqmodel": ("GPTQModel, best of its settings", "#d98a1f", "^"),
    "llmcompressor": ("llm-compressor, best of its settings", "#c2506b", "s"),
    "autoround": ("AutoRound, 200 iterations", "#8a6d3b", "v"),
}


def line(row: Row) -> str:
    """A row of the table in one line."""
    return (
        f"{row['model']:<14}{row['bits']:<4g}g{row['group_size']:<4}{row['name']:<32}"
        f"{row['text']:<28}KL {row['kl']:8.5f} +- {row['kl_stderr']:.5f}  "
        f"ppl {row['perplexity']:8.3f}  top-1 {row['top1']:.4f}  "
        f"wall {row['seconds']:6.1f} s  CPU {row['cpu_seconds']:6.1f} s"
    )


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def setting(row: Row) -> tuple[Any, ...]:
    """Where rows can be compared, but for their bits."""
    return row["model"], row["text"], row["group_size"], row["symmetric"], row["calibration"]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Geometric means of every contender, and what llmq is held against."""
    return {
        "means": _means(rows),
        "ratios": [found for bar in BARS for found in _ratios(rows, *bar)],
        "closed": _closed(rows),
        "predictions": _predictions(rows),
    }


def _means(rows: list[Row]) -> list[dict[str, Any]]:
    """Of every contender over the texts of a model: models differ too much to be mixed here."""
    found, of = [], ("model", "calibration", "bits", "name")
    for group in dict.fromkeys(tuple(row[key] for key in of) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in of) == group]
        keys = ("kl", "seconds", "cpu_seconds")
        means = {key: mean(row[key] for row in own) for key in keys}
        found.append({**dict(zip(of, group, strict=True)), "settings": len(own), **means})
    return found


def _ratios(
    rows: list[Row],
    name: str,
    tools: tuple[str, ...],
    their_bits: int | None,
    limits: dict[float, float],
    time_limit: float | None,
) -> list[dict[str, Any]]:
    """One entry per width; 1 = as much KL, or as much time, as the best of the peers."""
    found = []
    for bits, limit in limits.items():
        pairs = []
        for own in (row for row in rows if row["name"] == name and row["bits"] == bits):
            peers = [
                row
                for row in rows
                if row["tool"] in tools
                and row["bits"] == (their_bits or bits)
                and setting(row) == setting(own)
            ]
            if peers:
                pairs.append((own, peers))
        if not pairs:
            continue

        def over_best(key: str, pairs: list[tuple[Row, list[Row]]] = pairs) -> float:
            return mean(own[key] / min(peer[key] for peer in peers) for own, peers in pairs)

        entry = {"name": name, "against": list(tools), "bits": bits, "settings": len(pairs)}
        entry |= {"their_bits": their_bits or bits, "kl": over_best("kl"), "kl_limit": limit}
        if time_limit is not None:
            entry |= {"seconds": over_best("seconds"), "cpu_seconds": over_best("cpu_seconds")}
            entry["seconds_limit"] = time_limit
        found.append(entry)
    return found


def _closed(rows: list[Row]) -> list[dict[str, Any]]:
    """How much of the way from RTN's log-perplexity to the full model's is gone: geometric means.

    RTN reads no text: one row of it is the start for every calibration.
    """

    def place(row: Row) -> tuple[Any, ...]:
        keys = ("model", "text", "bits", "group_size", "symmetric", "windows", "seq_len")
        return tuple(row[key] for key in keys)

    starts = {place(row): row for row in rows if row["name"] == "llmq rtn"}
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["name"] in ("llmq balanced", "llmq best") and place(row) in starts:
            start = starts[place(row)]
            gap = math.log(start["perplexity"] / start["full_perplexity"])
            share = math.log(start["perplexity"] / row["perplexity"]) / gap
            found.setdefault(tuple(row[key] for key in CLOSED_KEYS), {})[row["text"]] = share
    return [
        {
            **dict(zip(CLOSED_KEYS, key, strict=True)),
            "texts": texts,
            "share": math.prod(max(share, 0) for share in texts.values()) ** (1 / len(texts)),
            "limit": CLOSED.get(key[CLOSED_KEYS.index("bits")]),
        }
        for key, texts in found.items()
    ]


def _predictions(rows: list[Row]) -> list[dict[str, Any]]:
    """Predicted over measured KL of mixed widths."""
    return [
        {**{key: row[key] for key in KEYS}, "ratio": row["predicted_kl"] / row["kl"]}
        for row in rows
        if row.get("predicted_kl")
    ]


def show(found: dict[str, Any]) -> None:
    """Print a summary."""
    for row in sorted(found["means"], key=lambda row: (row["model"], -row["bits"], row["kl"])):
        print(
            f"{row['model']:<14}{row['calibration'][:24]:<26}{row['bits']:<4g}{row['name']:<32}"
            f"KL {row['kl']:8.5f}  "
            f"wall {row['seconds']:7.1f} s  CPU {row['cpu_seconds']:7.1f} s  "
            f"over {row['settings']} settings"
        )
    for row in found["ratios"]:
        words = f"{row['name']} at {row['bits']:g} bits / best of {', '.join(row['against'])}"
        if row["their_bits"] != row["bits"]:
            words += f" at {row['their_bits']}"
        words += f": KL x{row['kl']:.2f} (limit {row['kl_limit']:.2f})"
        if "seconds" in row:
            words += f", wall x{row['seconds']:.2f} (limit {row['seconds_limit']:g})"
            words += f", CPU x{row['cpu_seconds']:.2f}"
        print(f"{words}, {row['settings']} settings")
    for row in found["closed"]:
        each = ", ".join(f"{share:.1%} on {text}" for text, share in row["texts"].items())
        print(
            f"{row['name']}, {row['model']} {row['bits']:g} bits g{row['group_size']}, "
            f"calibrated on {row['calibration']}: {row['share']:.1%} of the way from RTN "
            f"(limit {row['limit']}): {each}"
        )
    for row in found["predictions"]:
        print(
            f"{row['name']}, {row['model']} {row['bits']:g} bits, {row['text']}: "
            f"predicted KL x{row['ratio']:.2f} of the measured one"
        )


def points(rows: list[Row], style: str, x: str) -> list[tuple[float, float, float]]:
    """(x, KL, its error) per width of one line; for a peer of the best of its settings."""
    best: dict[float, Row] = {}
    for row in rows:
        same = row["name"] == style or row["name"].split()[0] == style
        if same and (row["bits"] not in best or row["kl"] < best[row["bits"]]["kl"]):
            best[row["bits"]] = row
    return [(row[x], row["kl"], row["kl_stderr"]) for _, row in sorted(best.items())]


def plot(rows: list[Row], path: Path) -> None:
    """KL against bits and against time, a column per setting; for light and for dark pages."""
    import charts
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys(setting(row) for row in rows if row["tool"] in PEERS))
    size = (4.2 * len(columns), 7.4)
    figure, grid = plt.subplots(
        2, len(columns), figsize=size, squeeze=False, sharey="col", layout="constrained"
    )
    axis_of: tuple[tuple[str, str], ...] = (
        ("bits", "bits per code (average)"),
        ("cpu_seconds", "CPU seconds of the whole process"),
    )
    for i, column in enumerate(columns):
        own = [row for row in rows if setting(row) == column]
        model, text, group, symmetric, _ = column
        kind = "symmetric" if symmetric else "asymmetric"
        title = f"{model}, g{group} {kind}\n{text}"
        grid[0][i].set_title(title, color=charts.GREY, fontsize=11)
        for axes, (x, label) in zip(grid[:, i], axis_of, strict=True):
            for style, look in STYLES.items():
                if values := points(own, style, x):
                    charts.line(axes, look, values)
            axes.set_yscale("log")
            charts.plain(axes, label)
        grid[1][i].set_xscale("log")
    for axes in grid[:, 0]:
        axes.set_ylabel("KL(full || quantized), nats per token", color=charts.GREY)
    grid[0][0].legend(frameon=False, labelcolor=charts.GREY, fontsize=8)
    charts.save(figure, path)
