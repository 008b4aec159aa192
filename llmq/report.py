"""What a run did, as values that a machine can read and tables that a person can."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import FormatError, SourceError
from llmq.output import writing
from llmq.page import report_page

if TYPE_CHECKING:
    from rich.table import Table

    from llmq.scheme import QuantScheme
    from llmq.sensitivity import Sensitivity
    from llmq.store import LayerReport

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"


def expert_coverage(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Calibration tokens that reached the experts of each mixture, one entry per layer.

    An expert is `starved` if it saw fewer tokens than its input is wide; its second moment is
    then mostly that of its siblings (see `moments.with_prior`).
    """
    reached: dict[str, list[LayerReport]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        stack, _, number = parent.rpartition(".")
        if leaf == "gate_up_proj" and number.isdigit():
            reached.setdefault(stack, []).append(layer)
    return [
        {
            "layer": stack,
            "experts": len(experts),
            "fewest_tokens": min(e.tokens for e in experts),
            "median_tokens": statistics.median(e.tokens for e in experts),
            "most_tokens": max(e.tokens for e in experts),
            "starved": [int(e.name.split(".")[-2]) for e in experts if e.tokens < e.shape[1]],
        }
        for stack, experts in reached.items()
    ]


def layer_entry(layer: Any) -> dict[str, Any]:
    """The JSON form of one `quantize.LayerReport`: its fields, those of its scheme spelt out."""
    entry: dict[str, Any] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            entry.update(asdict(value))
        else:
            entry[field.name] = value
    return entry


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `quantization_report.json` and the page of it. NaN is no JSON and is refused."""
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(report_page(report), encoding="utf-8")


def add_evaluation(folder: Path, measured: Mapping[str, Any]) -> None:
    """Add a measurement to the report in `folder`; an earlier one by the same protocol goes.

    Args:
        measured: what `Evaluation.to_json` returns.

    Raises:
        SourceError: there is no report.
        OutputError: it cannot be written.
    """
    report = read_report(folder)
    if report is None:
        raise SourceError(f"{folder}: no {REPORT_FILE}. Give a folder that llmq quantize wrote.")
    kept = [e for e in report.get("evaluations", []) if e["protocol"] != measured["protocol"]]
    report["evaluations"] = [*kept, dict(measured)]
    with writing(folder):
        write_report(folder, report)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report beside a checkpoint; None if there is none."""
    return read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None


def peak_memory_bytes(device: str) -> int:
    """Highest memory use so far: of tensors on a GPU, else of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """ "12.345 +- 0.067"; "-" for a value that is not known."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def size(nbytes: float) -> str:
    """Bytes for people: "1.93 MB"."""
    power = min(4, int(math.log(max(nbytes, 1), 1000)))
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    value = nbytes / 1000**power
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(value)))
    return f"{value:.{digits}f} {unit}"


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `bench.Report`, packed and reference side by side, as a rich table."""
    beside = {(r["batch"], r["prompt"]): r for r in rows if r["model"] == "reference"}
    columns = ["batch x prompt"]
    for name in ("prefill/s", "decode/s", "of roof", "memory"):
        columns += [name, *(["original"] if beside else [])]
        columns += ["ratio"] if beside and name.endswith("/s") else []
    lines = []
    for row in (r for r in rows if r["model"] != "reference"):
        other = beside.get((row["batch"], row["prompt"]))
        line = [f"{row['batch']} x {row['prompt']}"]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            line.append(f"{row[key]:.1f}")
            if other:
                line += [f"{other[key]:.1f}", f"{row[key] / other[key]:.2f}x"]
        pair = [row, other] if other else [row]
        line += [f"{r['of_roof']:.0%}" for r in pair]
        line += [size(r["peak_bytes"] or r["memory_bytes"]) for r in pair]
        lines.append(line)
    return table("", columns, lines)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table: the first column is text, the others are aligned as numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for number, column in enumerate(columns):
        if number:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, min_width=14, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def sensitivity_table(units: Sequence[Sensitivity], schemes: Mapping[str, QuantScheme]) -> Table:
    """Predicted KL of every group of layers at every width, and what it gets: bits, groups."""
    most = max(unit.kl[4] / unit.weights for unit in units)
    rows = []
    for unit in units:
        stem, _, _ = unit.names[0].rpartition(".")
        leaves = "+".join(name.rpartition(".")[2] for name in unit.names)
        bar = "#" * math.ceil(20 * unit.kl[4] / unit.weights / most) if most > 0 else ""
        losses = (f"{kl:.2e}" for kl in unit.kl.values())
        scheme = schemes[unit.names[0]]
        given = f"{scheme.bits} g{scheme.group_size}" if unit.wider else str(scheme.bits)
        rows.append((f"{stem}.{leaves}", *losses, bar, given))
    heads = [f"KL at {bits}" for bits in units[0].kl]
    return table("", ["layers", *heads, "4-bit KL per weight", "bits"], rows)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        FormatError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}.") from error
