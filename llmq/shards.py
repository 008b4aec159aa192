"""Safetensors files in pieces: headers, one tensor at a time, files put together from files.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header,
the header, then all tensors without gaps. Nothing here holds more than one chunk of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmq.errors import FormatError, NonFiniteError, SourceError

CHUNK = 1 << 24  # bytes that are read at once
INDEX = "model.safetensors.index.json"
# In the order in which the format's own library lays tensors out: wide types first.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ORDER = {name: i for i, name in enumerate(DTYPES)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        path: the file.
        dtype: its name in the header ("BF16").
        shape: of the tensor.
        start, stop: bytes from the start of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def natural(key: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a header."""
    return _NAMES[dtype]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, those that its index names; empty if it has none.

    Raises:
        FormatError: the index is damaged or names a file that is not there.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: damaged; get the checkpoint again.") from error
    for name in names:
        if not (folder / name).is_file():
            raise FormatError(f"{folder / name}: missing, but {INDEX} names it. Get it again.")
    return [folder / name for name in names]


def entries(path: Path) -> dict[str, Entry]:
    """What a file holds, in the order of its bytes.

    Raises:
        FormatError: the header is damaged, or the file shorter or longer than it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            begin = 8 + length
            found = {
                name: Entry(
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    begin + entry["data_offsets"][0],
                    begin + entry["data_offsets"][1],
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise FormatError(
                f"{path}: damaged: no header of a safetensors file. Get it again."
            ) from error
    found = dict(sorted(found.items(), key=lambda item: item[1].start))
    end = max((entry.stop for entry in found.values()), default=begin)
    if end != size:
        raise FormatError(
            f"{path}: damaged: {size} bytes, but its header speaks of {end}. Get it again."
        )
    return found


def chunks(file: BinaryIO, start: int, stop: int) -> Iterator[bytearray]:
    """The bytes [start, stop) of a file, at most `CHUNK` at once."""
    file.seek(start)
    while start < stop:
        data = bytearray(min(CHUNK, stop - start))
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise FormatError(f"{file.name}: became shorter while it was read.")
        start += len(data)
        yield data


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for data in chunks(file, 0, path.stat().st_size):
            digest.update(data)
    return digest.hexdigest()


def check_source(paths: Sequence[Path]) -> str:
    """Read all tensors once: SHA-256 over names and bytes of the files, if all are finite.

    Raises:
        NonFiniteError: names file, tensor and index of the first value that is NaN or infinite.
        FormatError: a file is damaged.
    """
    total = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            found = entries(path)
            first = min((entry.start for entry in found.values()), default=path.stat().st_size)
            for data in chunks(file, 0, first):
                digest.update(data)
            for name, entry in found.items():
                bad = 0
                where: int | None = None
                seen = 0
                for data in chunks(file, entry.start, entry.stop):
                    digest.update(data)
                    wrong = _not_finite(data, DTYPES.get(entry.dtype))
                    if wrong is not None:
                        where = seen + int(wrong.int().argmax()) if where is None else where
                        bad += int(wrong.sum())
                    seen += len(data) // DTYPES.get(entry.dtype, torch.uint8).itemsize
                if where is not None:
                    index = [int(i) for i in torch.unravel_index(torch.tensor(where), entry.shape)]
                    raise NonFiniteError(
                        f"{path.name}: {name}: {bad} of {seen} values are NaN or infinite, the "
                        f"first at {index}. The checkpoint is damaged; get it again."
                    )
        total.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _not_finite(data: bytearray, dtype: torch.dtype | None) -> Tensor | None:
    """Which values of a chunk are NaN or infinite, flat; None if none of them is."""
    if dtype is None or not dtype.is_floating_point:
        return None
    values = torch.frombuffer(data, dtype=dtype)
    if dtype.itemsize == 1:
        values = values.float()
    wrong = values.isfinite().logical_not_()
    return wrong if bool(wrong.any()) else None


def _header(shapes: Mapping[str, tuple[str, Sequence[int], int]]) -> tuple[bytes, list[str]]:
    """The start of a file and the order of its tensors, given (dtype, shape, bytes) of each."""
    order = sorted(shapes, key=lambda name: (_ORDER[shapes[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, nbytes = shapes[name]
        span = [offset, offset + nbytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Sequence[int], int]]:
    return {n: (_NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that `write` makes of tensors, which may be on meta."""
    return len(_header(_shapes(tensors))[0]) + sum(t.nbytes for t in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a safetensors file; its SHA-256."""
    start, order = _header(_shapes(tensors))
    return write_bytes(path, [start], (tensors[name] for name in order))


def write_bytes(path: Path, start: Iterable[bytes], tensors: Iterable[Tensor]) -> str:
    """Write `start` and the bytes of `tensors` one after the other; the file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in start:
            digest.update(data)
            file.write(data)
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            for piece in flat.split(CHUNK):
                data = piece.numpy().data
                digest.update(data)
                file.write(data)
    return digest.hexdigest()


def combine(found: Mapping[str, Entry], path: Path) -> str:
    """Write a file that holds copies of tensors of other files; its SHA-256."""
    shapes = {n: (e.dtype, e.shape, e.stop - e.start) for n, e in found.items()}
    start, order = _header(shapes)
    digest = hashlib.sha256(start)
    with path.open("wb") as out:
        out.write(start)
        for name in order:
            entry = found[name]
            with entry.path.open("rb") as file:
                for data in chunks(file, entry.start, entry.stop):
                    digest.update(data)
                    out.write(data)
    return digest.hexdigest()


def need_safetensors(folder: Path) -> list[Path]:
    """The files of `weight_files`, at least one.

    Raises:
        SourceError: there is none.
    """
    files = weight_files(folder)
    if not files:
        raise SourceError(
            f"{folder}: holds no model.safetensors. Load the model with transformers and write "
            "it with save_pretrained, which makes such a file."
        )
    return files
