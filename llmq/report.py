"""What a run did, as values that a machine can read and tables that a person can."""

from __future__ import annotations

import json
import math
import statistics
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import FormatError, SourceError
from llmq.output import writing
from llmq.page import report_page

if TYPE_CHECKING:
    from rich.table import Table

    from llmq.quantize import LayerReport
    from llmq.scheme import QuantScheme
    from llmq.sensitivity import Sensitivity

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"
_PARTS = ("_packed", "_scale", "_zero_point", "_shape")
_INTEGERS = {"I64": "q", "I32": "i"}
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors format


@dataclass(frozen=True)
class StoredLayer:
    """One module of a checkpoint on disk, or all that is not quantized.

    Attributes:
        name: the module's name, or "(n others)".
        scheme: "int4 g64 asymmetric", or the dtypes of what is not quantized.
        shape: (N, K), (E, N, K) for a stack of experts, or None for several modules.
        weights: how many weights.
        bytes: what they take on disk, scales and zero points included.
        error: relative output error on the calibration text, if a report lies beside it.
    """

    name: str
    scheme: str
    shape: tuple[int, ...] | None
    weights: int
    bytes: int
    error: float | None = None
    quantized: bool = True


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
    return _read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None


def inspect_checkpoint(folder: Path) -> list[StoredLayer]:
    """The modules of a checkpoint folder, from its headers only: no weight is read.

    Raises:
        SourceError: not a folder with config.json and safetensors files.
        FormatError: a file that is not what it claims to be.
    """
    from llmq.formats.compressed_tensors import parse_config

    headers = tensor_headers(folder)
    config = _read_json(folder / "config.json").get("quantization_config")
    schemes = parse_config(config) if config else None
    report = read_report(folder) or {}
    errors = {_error_key(layer["name"]): layer["error"] for layer in report.get("layers", [])}
    rows: list[StoredLayer] = []
    others = dict(headers)
    for key in sorted(headers, key=_natural):
        prefix = key.removesuffix("_packed")  # "...q_proj.weight", or "...experts.down_proj"
        name = prefix.removesuffix(".weight")
        scheme = schemes.scheme_for(name) if schemes and key != prefix else None
        if scheme is None:
            continue
        parts = [others.pop(prefix + part).nbytes for part in _PARTS if prefix + part in others]
        if f"{prefix}_shape" not in headers:
            raise FormatError(f"{folder}: {prefix}_shape is missing: the checkpoint is damaged.")
        counts = headers[f"{prefix}_shape"].value
        shape = (*headers[key].shape[:-2], *counts[:2])  # (N, K) or (E, N, K)
        experts = range(shape[0]) if len(shape) == 3 else [None]
        found = [errors[k] for e in experts if (k := _error_key(name, e)) in errors]
        error = sum(found) / len(found) if found else None
        label = _describe(scheme)
        rows.append(StoredLayer(name, label, shape, math.prod(shape), sum(parts), error))
    if others:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in others.values()}))
        weights = sum(math.prod(tensor.shape) for tensor in others.values())
        taken = sum(tensor.nbytes for tensor in others.values())
        rows.append(
            StoredLayer(f"({len(others)} others)", dtypes, None, weights, taken, quantized=False)
        )
    return rows


def bits_per_weight(layers: Sequence[StoredLayer]) -> float:
    """Stored bits per quantized weight; of all weights if none is quantized."""
    chosen = [layer for layer in layers if layer.quantized] or layers
    return 8 * sum(layer.bytes for layer in chosen) / sum(layer.weights for layer in chosen)


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


def sensitivity_table(units: Sequence[Sensitivity], widths: Mapping[str, int]) -> Table:
    """Predicted KL of every group of layers at every width, and the width that it gets."""
    most = max(unit.kl[4] / unit.weights for unit in units)
    rows = []
    for unit in units:
        stem, _, _ = unit.names[0].rpartition(".")
        leaves = "+".join(name.rpartition(".")[2] for name in unit.names)
        bar = "#" * math.ceil(20 * unit.kl[4] / unit.weights / most) if most > 0 else ""
        losses = (f"{kl:.2e}" for kl in unit.kl.values())
        rows.append((f"{stem}.{leaves}", *losses, bar, str(widths[unit.names[0]])))
    heads = [f"KL at {bits}" for bits in units[0].kl]
    return table("", ["layers", *heads, "4-bit KL per weight", "bits"], rows)


def _describe(scheme: QuantScheme) -> str:
    group = "row" if scheme.group_size == -1 else f"g{scheme.group_size}"
    return f"int{scheme.bits} {group} {'symmetric' if scheme.symmetric else 'asymmetric'}"


def _error_key(name: str, expert: int | None = None) -> tuple[str, ...]:
    """What a matrix has in common in the report and on disk.

    The report knows the experts of a stack by number; on disk they may lie one by one under
    other names, gate and up apart (gate_proj and up_proj, or w1 and w3; w2 is down).
    """
    if ".experts." not in name:
        return (name,)
    numbers = [part for part in name.split(".") if part.isdigit()]
    numbers += [] if expert is None else [str(expert)]
    return (*numbers, "down" if name.endswith(("down_proj", "w2")) else "gate_up")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor; `value` only of a packed matrix's shape."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    value: tuple[int, ...] = ()


def tensor_headers(folder: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor in a folder of safetensors; no weight is read.

    Raises:
        SourceError: not a folder with config.json and safetensors files.
        FormatError: a file that is not what it claims to be.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: not a folder with config.json and *.safetensors.")
    tensors = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _HEADER_LIMIT:
                raise FormatError(f"{file}: not a safetensors file.")
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise FormatError(f"{file}: not a safetensors file.") from error
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                value: tuple[int, ...] = ()
                if name.endswith("_shape") and entry["dtype"] in _INTEGERS:
                    stream.seek(8 + length + start)
                    count = (stop - start) // struct.calcsize(_INTEGERS[entry["dtype"]])
                    code = f"<{count}{_INTEGERS[entry['dtype']]}"
                    value = struct.unpack(code, stream.read(stop - start))
                shape = tuple(entry["shape"])
                tensors[name] = Header(entry["dtype"], shape, stop - start, value)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}.") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
