"""Is a checkpoint what it should be? Nothing here uses the code that packed it.

check_part   codes, scales and zero points on disk against those that a solver returned
seal         write checksums.sha256, which `sha256sum -c` reads too
check        a folder against its checksums, its config.json and the rules of the format
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llmq import shards
from llmq.errors import FormatError, IntegrityError, SourceError
from llmq.journal import LOG
from llmq.report import PAGE_FILE, REPORT_FILE
from llmq.stored import inspect_checkpoint

CHECKSUMS = "checksums.sha256"
_ROWS = 1 << 22  # codes that are unpacked at once


def unpack(words: Any, bits: int, count: int) -> Any:
    """The first `count` codes of each row of a little-endian bit stream.

    Args:
        words: int32 (N, W), numpy.
        bits: of a code.

    Returns:
        uint8 (N, count), numpy.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    flags = np.unpackbits(stream, axis=1, bitorder="little", count=count * bits)
    flags = flags.reshape(len(words), count, bits)
    codes = flags[..., 0].copy()
    for bit in range(1, bits):
        codes |= flags[..., bit] << bit
    return codes


def check_part(
    path: Path,
    bits: Mapping[str, int],
    codes: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    zeros: Mapping[str, Tensor],
) -> None:
    """Compare packed matrices in a file with what they were packed from.

    Args:
        path: a safetensors file.
        bits: key of a dense weight in the original's files -> bits of its codes.
        codes: key -> uint8 (N, K) or (E, N, K).
        scales: key -> (N, K/G) or (E, N, K/G).
        zeros: key -> uint8, shaped like the scales.

    Raises:
        IntegrityError: names the file and the tensor.
    """
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for key, width in bits.items():
            if f"{key}_packed" not in keys or f"{key}_scale" not in keys:
                raise IntegrityError(f"{path.name}: {key}_packed or {key}_scale is not there.")
            stored = file.get_tensor(f"{key}_scale")
            if not torch.equal(stored, scales[key].cpu()) or not bool(stored.isfinite().all()):
                raise _differs(path, f"{key}_scale")
            wanted = _stack(codes[key])
            packed = _stack(file.get_tensor(f"{key}_packed"))
            for words, codes_of_one in zip(packed, wanted, strict=True):
                step = max(1, _ROWS // codes_of_one.shape[1])
                for start in range(0, len(words), step):
                    rows = slice(start, start + step)
                    found = unpack(words[rows], width, codes_of_one.shape[1])
                    if not np.array_equal(found, codes_of_one[rows]):
                        raise _differs(path, f"{key}_packed")
            wanted = _stack(zeros[key])
            if f"{key}_zero_point" in keys:
                for words, zero in zip(
                    _stack(file.get_tensor(f"{key}_zero_point")), wanted, strict=True
                ):
                    if not np.array_equal(unpack(words.T, width, len(zero)), zero.T):
                        raise _differs(path, f"{key}_zero_point")
            elif (wanted != 2 ** (width - 1)).any():
                raise _differs(path, f"{key}_zero_point")


def check_exact(path: Path, suffix: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors in a file with what was written.

    Args:
        path: a safetensors file.
        suffix: of their names, "weight_book" for example.
        tensors: key of a dense weight in the original's files -> what shall stand beside it.

    Raises:
        IntegrityError: names the file and the tensor.
    """
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for dense, wanted in tensors.items():
            key = dense.removesuffix("weight") + suffix
            if key not in keys or not torch.equal(file.get_tensor(key), wanted.cpu()):
                raise _differs(path, key)


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write the SHA-256 of every file in `folder`; `known` are those that need no reading.

    Not of report and log: these tell times, and the rest is the same from run to run.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    left = {CHECKSUMS, REPORT_FILE, PAGE_FILE, LOG}
    names = [path.relative_to(folder).as_posix() for path in files if path.name not in left]
    lines = [f"{known.get(name) or shards.file_hash(folder / name)}  {name}\n" for name in names]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check(folder: Path) -> list[str]:
    """Check a checkpoint that llmq wrote; the names of the files that were checked.

    Every file has its SHA-256, every packed matrix is complete and as config.json says, every
    floating-point value is finite.

    Raises:
        SourceError: not such a folder.
        FormatError: names the file that is missing or has changed, or the tensor that is wrong.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder.")
    if not (folder / CHECKSUMS).is_file():
        raise FormatError(f"{folder}: holds no {CHECKSUMS}, so nothing can be compared.")
    names = []
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            raise FormatError(f"{folder / CHECKSUMS}: damaged: {line[:80]!r}.")
        digest, name = match.groups()
        if not (folder / name).is_file():
            raise FormatError(f"{folder / name}: missing. Copy the checkpoint again.")
        if shards.file_hash(folder / name) != digest:
            raise FormatError(f"{folder / name}: is not the file that was written. Copy it again.")
        names.append(name)
    unlisted = {path.name for path in folder.glob("*.safetensors")} - set(names)
    if unlisted:
        raise FormatError(f"{folder}: {CHECKSUMS} does not know {', '.join(sorted(unlisted))}.")
    inspect_checkpoint(folder)
    shards.check_source(shards.weight_files(folder))
    return names


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()


def _stack(tensor: Tensor) -> Any:
    """(E, ...), numpy, of an integer tensor (E, N, K) or (N, K)."""
    return (tensor if tensor.ndim == 3 else tensor.unsqueeze(0)).cpu().numpy()


def _differs(path: Path, key: str) -> IntegrityError:
    return IntegrityError(
        f"{path.name}: {key} on disk is not what was solved. The disk or the memory of this "
        "machine is faulty; run the same command again."
    )
