"""A report as one HTML page that needs nothing else: no script, no font, no network.

    report_page     what `llmq quantize` leaves as quantization_report.html
    compare_page    several checkpoints of one model: KL against size

Both are pure functions of report values (see `llmq.report`). What was not measured is said to be
so, never left out silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmq import plots
from llmq.markup import page, section, table
from llmq.plots import short

WORST = 10
# Bits per weight.
_SUPER_BLOCKS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


def report_page(report: Mapping[str, Any]) -> str:
    """The page of one run.

    Args:
        report: what `llmq.quantize` returns, with or without "evaluations".
    """
    layers = list(report.get("layers", []))
    title = f"{report.get('source', 'model')}, quantized"
    measured = list(report.get("evaluations", []))
    sections = [
        section("Output error per layer", _errors(layers), _ERROR_NOTE),
        section("Worst layers", _worst(layers)),
        section("Size per block", _sizes(layers)),
        section("Number formats", _formats(layers)),
        *(_evaluation(entry) for entry in measured),
        *([] if measured else [section("Loss on held-out text", "<p>Not measured.</p>")]),
        section("Calibration tokens per expert", _coverage(report.get("expert_coverage", []))),
        section("Time in the solver", _seconds(layers)),
        section("How it was made", _recipe(report)),
    ]
    body = f"<h1>{escape(title)}</h1>{_tiles(report)}"
    return page(title, body + f'<div class="plots">{"".join(filter(None, sections))}</div>')


def compare_page(entries: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """KL against size of several checkpoints of one model.

    Args:
        entries: each with name, bytes, bits_per_weight, kl, kl_stderr, perplexity,
            perplexity_stderr and top1; unknown values are None.
        protocol: how all of them were measured.
    """
    points = [
        (entry["name"], entry["bytes"] / 1e6, entry["kl"], entry.get("kl_stderr"))
        for entry in entries
        if entry["kl"] > 0
    ]
    plot = plots.scatter(points, title="KL against size", x_label="MB on disk", y_label="KL (nats)")
    heads = ["", "MB", "bits", "KL (nats)", "top-1", "perplexity"]
    rows = [
        (
            entry["name"],
            f"{entry['bytes'] / 1e6:.2f}",
            f"{entry['bits_per_weight']:.2f}",
            plus_minus(entry["kl"], entry.get("kl_stderr")),
            "-" if entry.get("top1") is None else f"{entry['top1']:.2%}",
            plus_minus(entry["perplexity"], entry.get("perplexity_stderr")),
        )
        for entry in sorted(entries, key=lambda entry: entry["bytes"])
    ]
    title = "Checkpoints compared"
    body = (
        f"<h1>{title}</h1>"
        + section("KL against size", plot)
        + section("Numbers", table(heads, rows))
    )
    return page(title, f"{body}<p>{escape(protocol)}</p>")


def plus_minus(value: float, error: float | None) -> str:
    """ "12.3 ± 0.4": digits as far as the error allows."""
    if not error:
        return short(value)
    digits = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def kind_of(name: str) -> str:
    """The name of a layer without its numbers: "self_attn.q_proj", "mlp.experts.down_proj"."""
    parts = re.split(r"(?:^|\.)\d+(?:\.|$)", name)
    return ".".join(part for part in parts[1:] if part) or name


def block_of(name: str) -> int | None:
    """The number of the block that a layer belongs to; None outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


_ERROR_NOTE = (
    "Expected squared error of the layer's output on the calibration text, relative to the output; "
    "the mean over experts where there are several."
)


def _tiles(report: Mapping[str, Any]) -> str:
    size = report.get("bytes")
    calibration = report.get("calibration", {})
    tiles = [
        ("bits per quantized weight", _known(report.get("bits_per_weight"), "{:.2f}")),
        ("checkpoint", "not known" if size is None else f"{size / 1e6:.2f} MB"),
        ("method", str(report.get("method", "not known"))),
        ("calibration tokens", _known(calibration.get("tokens"), "{:,}")),
        ("seconds", _known(report.get("seconds"), "{:.1f}")),
        ("peak memory", _known(report.get("peak_memory_bytes"), "{:.2e} bytes", 1e9, "{:.2f} GB")),
    ]
    tuning = report.get("scale_tuning") or {}
    if tuning.get("kl_before") is not None and tuning.get("kl_after") is not None:
        change = f"{short(tuning['kl_before'])} to {short(tuning['kl_after'])}"
        tiles.append(("KL on held-out calibration text, by tuning scales", change))
    for entry in report.get("evaluations", [])[-1:]:
        after = plus_minus(entry["perplexity"], entry.get("perplexity_stderr"))
        tiles.append(("perplexity", after))
        if "kl" in entry:
            tiles.append(("perplexity before", short(entry.get("reference_perplexity", math.nan))))
            tiles.append(("KL to the original", plus_minus(entry["kl"], entry.get("kl_stderr"))))
            tiles.append(("top-1 agreement", f"{entry['top1']:.2%}"))
    return '<div class="tiles">{}</div>'.format(
        "".join(f'<div class="tile"><b>{escape(v)}</b><span>{k}</span></div>' for k, v in tiles)
    )


def _known(value: float | None, form: str, unit: float = 1, large: str = "") -> str:
    if value is None:
        return "not known"
    return (large or form).format(value / unit if large else value)


def _errors(layers: Sequence[Mapping[str, Any]]) -> str:
    """Lines of error over blocks, one per kind of layer."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        block = block_of(layer["name"])
        if block is not None:
            found.setdefault(kind_of(layer["name"]), {}).setdefault(block, []).append(
                layer["error"]
            )
    series = {
        kind: [(block, sum(errors) / len(errors)) for block, errors in by_block.items()]
        for kind, by_block in found.items()
    }
    return plots.line_plot(
        series,
        title="Relative output error per layer and kind",
        x_label="block",
        y_label="relative error",
        log=True,
    )


def _worst(layers: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted(layers, key=lambda layer: -layer["error"])[:WORST]
    values = [(layer["name"], layer["error"], short(layer["error"])) for layer in worst]
    return plots.bars(values, title="Layers with the largest relative output error")


def stored_bits(layer: Mapping[str, Any]) -> float:
    """Bits per weight of one layer's entry: code, and 16-bit scale and zero point per group.

    Of a code book its table too, and its outliers with their columns. Of super-blocks what a
    super-block takes.
    """
    if kind := layer.get("kind"):
        return _SUPER_BLOCKS[kind]
    K = layer["shape"][1]
    group = layer["group_size"] if layer["group_size"] > 0 else K
    table = 16 * 2 ** layer["bits"] if layer.get("book") == "learned" else 0
    beside = table + 48 * math.ceil(layer.get("outliers", 0) * K)
    zero = 0 if layer["symmetric"] else layer["bits"]
    return layer["bits"] + (16 + zero) / group + beside / K


def _sizes(layers: Sequence[Mapping[str, Any]]) -> str:
    sizes: dict[str, float] = {}
    for layer in layers:
        if "bits" in layer:
            block = block_of(layer["name"])
            label = layer["name"] if block is None else str(block)
            N, K = layer["shape"]
            sizes[label] = sizes.get(label, 0) + N * K * stored_bits(layer) / 8e6
    plot = plots.columns(
        list(sizes.items()), title="Packed size per block", x_label="block", y_label="MB"
    )
    if len({layer.get("bits") for layer in layers}) < 2:
        return plot
    widths: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        block = block_of(layer["name"])
        if block is not None and "bits" in layer:
            widths.setdefault(kind_of(layer["name"]), []).append((block, layer["bits"]))
    return plot + plots.line_plot(
        widths, title="Bits per layer", x_label="block", y_label="bits per code"
    )


def _formats(layers: Sequence[Mapping[str, Any]]) -> str:
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        if "bits" in layer:
            group = "row" if layer["group_size"] == -1 else str(layer["group_size"])
            zero = "no" if layer["symmetric"] else "yes"
            own = layer.get("book") or layer.get("kind")
            bits = str(layer["bits"]) + (f" ({own})" if own else "")
            found.setdefault((kind_of(layer["name"]), bits, group, zero), []).append(layer)
    rows = [
        (
            kind,
            str(len(same)),
            bits,
            group,
            zero,
            f"{sum(math.prod(s['shape']) * stored_bits(s) for s in same) / 8e6:.3f}",
        )
        for (kind, bits, group, zero), same in found.items()
    ]
    return table(["layer", "matrices", "bits", "group", "zero points", "MB"], rows)


def _seconds(layers: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, float] = {}
    for layer in layers:
        kind = kind_of(layer["name"])
        found[kind] = found.get(kind, 0) + layer.get("seconds", 0)
    values = [(kind, seconds, f"{short(seconds)} s") for kind, seconds in found.items()]
    return plots.bars(values, title="Seconds in the solver per kind of layer")


def _coverage(coverage: Sequence[Mapping[str, Any]]) -> str:
    if not coverage:
        return ""
    heads = ["layer", "experts", "fewest", "median", "most", "starved"]
    rows = [
        (
            entry["layer"],
            *(
                f"{entry[key]:g}"
                for key in ("experts", "fewest_tokens", "median_tokens", "most_tokens")
            ),
            str(len(entry["starved"])),
        )
        for entry in coverage
    ]
    series = {
        word: [(number, entry[f"{word}_tokens"]) for number, entry in enumerate(coverage)]
        for word in ("most", "median", "fewest")
    }
    plot = plots.line_plot(
        series, title="Tokens per expert", x_label="mixture", y_label="tokens", log=True
    )
    return plot + table(heads, rows)


def _evaluation(entry: Mapping[str, Any]) -> str:
    rows = [("perplexity", plus_minus(entry["perplexity"], entry.get("perplexity_stderr")))]
    if "reference_perplexity" in entry:
        rows.insert(0, ("perplexity of the original", short(entry["reference_perplexity"])))
    if "nll_difference" in entry:
        change = plus_minus(entry["nll_difference"], entry.get("nll_difference_stderr"))
        rows.append(("paired change, nats per token", change))
    if "nll_difference_95" in entry:
        low, high = entry["nll_difference_95"]
        rows.append(("its 95% interval", f"{short(low)} to {short(high)}"))
    if "kl" in entry:
        rows.append(("KL, nats per token", plus_minus(entry["kl"], entry.get("kl_stderr"))))
        rows.append(("top-1 agreement", f"{entry['top1']:.2%}"))
    plot = ""
    if found := entry.get("kl_histogram"):
        plot = plots.histogram(
            found["edges"], found["counts"], title="KL per token", x_label="KL per token (nats)"
        )
    body = plot + table(["measure", "value"], rows)
    return section("Loss on held-out text", body, entry.get("protocol", ""))


def _recipe(report: Mapping[str, Any]) -> str:
    rows = [
        (key.replace("_", " "), str(report[key]))
        for key in ("source", "base_model", "llmq", "torch", "transformers")
        if report.get(key) is not None
    ]
    used = report.get("calibration", {})
    rows += [(f"calibration {key}", str(value)) for key, value in used.items() if key != "sha256"]
    command = report.get("command")
    ran = f"<pre>{escape(command)}</pre>" if command else ""
    digest = ""
    if "sha256" in used:
        digest = f"<p>Calibration tokens, SHA-256: <code>{used['sha256']}</code></p>"
    return ran + table(["", ""], rows) + digest if rows else ""
