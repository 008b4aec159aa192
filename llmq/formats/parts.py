"""The tensors that make up one module in a checkpoint: their keys, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.scheme import QuantScheme

FLOATING: Literal["floating point"] = "floating point"


def key(name: str, suffix: str) -> str:
    """The key of a tensor of the module `name` ("" for bare keys)."""
    return f"{name}.{suffix}" if name else suffix


def find(name: str, suffix: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the module `name`.

    Raises:
        FormatError: it is missing.
    """
    where = key(name, suffix)
    if where not in tensors:
        raise FormatError(f"{where} is missing: the checkpoint is incomplete.")
    return tensors[where]


def take(
    name: str,
    suffix: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...] | None,
    dtype: torch.dtype | Literal["floating point"] = torch.int32,
) -> Tensor:
    """The same, of this shape (None = any matrix) and dtype (FLOATING = of any precision).

    Raises:
        FormatError: it is missing, or of another shape or dtype.
    """
    found = find(name, suffix, tensors)
    right = found.is_floating_point() if dtype == FLOATING else found.dtype == dtype
    if not right or (found.ndim != 2 if shape is None else tuple(found.shape) != shape):
        raise FormatError(
            f"{key(name, suffix)} is {found.dtype} {tuple(found.shape)}, expected "
            f"{str(dtype).removeprefix('torch.')} {shape or 'matrix'}; config.json and the weights "
            "disagree."
        )
    return found


def group_count(name: str, scheme: QuantScheme, K: int) -> int:
    """Groups per row of the module `name`.

    Raises:
        FormatError: the group size does not divide K.
    """
    if K == 0 or not scheme.divides(K):
        raise FormatError(
            f"{name or 'weight'}: in_features={K} is not divisible by group_size="
            f"{scheme.group_size}; config.json and the weights disagree."
        )
    return K // scheme.group_width(K)
