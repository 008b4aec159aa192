"""What a decoder block is called with, on any device and for any part of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The same call on another device, floating tensors in another dtype."""
        return Call(_cast(self.args, device, dtype), _cast(self.kwargs, device, dtype))

    def split(self, windows: int) -> list[Call]:
        """The calls of `windows` windows one by one: tensors with a row for each are cut."""
        rows = (slice(i, i + 1) for i in range(windows))
        return [Call(_cut(self.args, windows, r), _cut(self.kwargs, windows, r)) for r in rows]


def _cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {k: _cast(v, device, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, device, dtype) for v in value)
    return value


def _cut(value: Any, windows: int, row: slice) -> Any:
    if isinstance(value, Tensor):
        return value[row] if value.ndim > 1 and len(value) == windows else value
    if isinstance(value, dict):
        return {k: _cut(v, windows, row) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(v, windows, row) for v in value)
    return value
