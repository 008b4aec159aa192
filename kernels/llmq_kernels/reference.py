"""What the kernels must compute, in plain torch: the float64 definition and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackedWeight, unpack


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) that `weight` stands for: exact products, rounded once to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes, scale, zero = unpack(weight)
    codes = codes.unflatten(1, (scale.shape[1], -1)).to(wide)  # (N, K/G, G)
    middle = 2 ** (weight.bits - 1) if zero is None else zero.unsqueeze(-1)
    return codes.sub_(middle).mul_(scale.to(wide).unsqueeze(-1)).flatten(1).to(dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ W.T + bias in x's dtype: (..., N). Pass a float64 `x` for the definition."""
    W = dequantize(weight, x.dtype)
    return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def expert(weight: PackedWeight, index: int) -> PackedWeight:
    """One expert of a stacked weight."""
    per_expert = weight.counters.numel() // weight.qweight.shape[0]
    return PackedWeight(
        weight.qweight[index],
        weight.scale[index],
        None if weight.zero is None else weight.zero[index],
        weight.counters[index * per_expert : (index + 1) * per_expert],
        weight.bits,
        weight.group_size,
        weight.shape,
    )


def linear_experts(x: Tensor, weight: PackedWeight, chosen: Tensor) -> Tensor:
    """Every row of x through the experts chosen for it.

    Args:
        x: (T, K), or (T * top_k, K) when every chosen expert has an input row of its own.
        weight: E stacked matrices (N, K).
        chosen: integer (T, top_k).

    Returns:
        (T * top_k, N) in x's dtype.
    """
    pairs = chosen.flatten()  # (T * top_k,)
    rows = x.repeat_interleave(pairs.numel() // max(1, x.shape[0]), dim=0)
    out = x.new_zeros(pairs.numel(), weight.shape[0])
    for index in pairs.unique().tolist():
        mine = pairs == index
        out[mine] = linear(rows[mine], expert(weight, index))
    return out
