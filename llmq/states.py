"""Hidden states in files: for runs that go on after a stop, and to spare memory."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import shards


class States(MutableSequence[Tensor]):
    """Hidden states in files, one file per batch, mapped into memory while they are used.

    Attributes:
        entries: per batch its file and what is in it, as a journal keeps it.
        boundary: how many blocks the states have gone through that are written from now on; a
            part of their files' names, so that those of the last boundary are still there.
    """

    def __init__(self, folder: Path, number: int, entries: Sequence[dict[str, Any]]) -> None:
        self._folder = folder
        self._number = number
        self._device = torch.device("cpu")
        self.entries = list(entries)
        self.boundary = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self.entries[index]
        dtype = shards.DTYPES[entry["dtype"]]
        path, size = str(self._folder / entry["file"]), entry["bytes"]
        flat = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        return flat.view(dtype).view(entry["shape"]).to(self._device)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            self.entries[:] = [self._entry(i, states) for i, states in enumerate(value)]
        else:
            self.entries[index] = self._entry(index, value)

    def __delitem__(self, index: Any) -> None:
        del self.entries[index]

    def insert(self, index: int, value: Tensor) -> None:
        self.entries.insert(index, self._entry(index, value))

    def _entry(self, index: int, states: Tensor) -> dict[str, Any]:
        self._device = states.device
        name = f"stream-{self._number}-{self.boundary:05}-{index:05}.bin"
        new = self._folder / f"{name}.new"  # what is mapped must not become shorter
        digest = shards.write_bytes(new, [], [states])
        new.replace(self._folder / name)
        dtype = shards.name_of(states.dtype)
        shape = list(states.shape)
        return {
            "file": name,
            "sha256": digest,
            "dtype": dtype,
            "shape": shape,
            "bytes": states.nbytes,
        }
