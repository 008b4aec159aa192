"""What a checkpoint holds, from the headers of its files: no weight is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import FormatError, SourceError
from llmq.report import read_json, read_report

if TYPE_CHECKING:
    from llmq.scheme import QuantScheme

_PARTS = ("_packed", "_scale", "_zero_point", "_shape", "_book", "_outlier", "_outlier_index")
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


def inspect_checkpoint(folder: Path) -> list[StoredLayer]:
    """The modules of a checkpoint folder, from its headers only: no weight is read.

    In GPTQ and AWQ checkpoints a module is symmetric if config.json says so; zero points take
    their place there all the same.

    Raises:
        SourceError: not a folder with config.json and safetensors files.
        FormatError: a file that is not what it claims to be.
    """
    headers = tensor_headers(folder)
    config = read_json(folder / "config.json").get("quantization_config")
    report = read_report(folder) or {}
    errors = {_error_key(layer["name"]): layer["error"] for layer in report.get("layers", [])}
    rows: list[StoredLayer] = []
    others = dict(headers)
    for name, scheme, shape, keys in _packed(folder, headers, config) if config else ():
        taken = sum(others.pop(key).nbytes for key in keys)
        experts = range(shape[0]) if len(shape) == 3 else [None]
        found = [errors[k] for e in experts if (k := _error_key(name, e)) in errors]
        error = sum(found) / len(found) if found else None
        rows.append(StoredLayer(name, _describe(scheme), shape, math.prod(shape), taken, error))
    if others:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in others.values()}))
        weights = sum(math.prod(tensor.shape) for tensor in others.values())
        taken = sum(tensor.nbytes for tensor in others.values())
        rows.append(
            StoredLayer(f"({len(others)} others)", dtypes, None, weights, taken, quantized=False)
        )
    return rows


_Packed = tuple[str, "QuantScheme", tuple[int, ...], list[str]]


def _packed(
    folder: Path, headers: Mapping[str, Header], config: Mapping[str, Any]
) -> Iterator[_Packed]:
    """Name, scheme, shape and keys of every packed module, in the order of their names."""
    from llmq.formats import awq, compressed_tensors, gptq
    from llmq.formats.layouts import layout_of

    layout = layout_of(config)
    for key in sorted(headers, key=_natural):
        if layout.method == compressed_tensors.METHOD:
            prefix = key.removesuffix("_packed")  # "...q_proj.weight", or "...experts.down_proj"
            name = prefix.removesuffix(".weight")
            if key.endswith(".weight") and name in layout.config.embeddings:
                scheme = layout.config.embeddings[name]
                keys = [key, *(f"{key}{part}" for part in _PARTS)]
                yield name, scheme, headers[key].shape, [key for key in keys if key in headers]
                continue
            scheme = layout.config.scheme_for(name) if key != prefix else None
            if scheme is None:
                continue
            if f"{prefix}_shape" not in headers:
                raise FormatError(
                    f"{folder}: {prefix}_shape is missing: the checkpoint is damaged."
                )
            counts = headers[f"{prefix}_shape"].value
            shape = (*headers[key].shape[:-2], *counts[:2])  # (N, K) or (E, N, K)
            keys = [prefix + part for part in _PARTS]
        elif key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            module = gptq if layout.method == gptq.METHOD else awq
            scheme = layout.modules([key])[name]
            shape = module.shape(name, {key: headers[key].shape}, scheme)
            scheme = replace(scheme, symmetric=bool(config.get("sym")))
            keys = [f"{name}.{suffix}" for suffix in layout.suffixes]
        else:
            continue
        yield name, scheme, shape, [key for key in keys if key in headers]


def bits_per_weight(layers: Sequence[StoredLayer]) -> float:
    """Stored bits per quantized weight; of all weights if none is quantized."""
    chosen = [layer for layer in layers if layer.quantized] or layers
    return 8 * sum(layer.bytes for layer in chosen) / sum(layer.weights for layer in chosen)


def _describe(scheme: QuantScheme) -> str:
    group = "row" if scheme.group_size == -1 else f"g{scheme.group_size}"
    if kind := getattr(scheme, "kind", None):  # of a `superblocks.SuperBlockScheme`
        return kind
    book = getattr(scheme, "book", None)  # of a `codebook.CodebookScheme`
    if book:
        return f"{book if book == 'nf4' else f'{book} {scheme.bits}-bit'} {group}"
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


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
