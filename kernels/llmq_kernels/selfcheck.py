"""Whether the kernels compute on this device what `reference` says: a tiny problem, once.

A compiler, a driver or a GPU that nobody has tried must not be able to give wrong numbers quietly.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from . import layout, ops, reference
from .layout import PackedWeight
from .plan import FUSED_LIMIT

# Four row tiles with padding, enough columns for split-K, one row, several, and too many to fuse.
N, K = 250, 1024
ROWS = (1, 20, FUSED_LIMIT + 1)
EXPERTS, TOKENS, TOP_K = 4, 6, 2

Linear = Callable[[Tensor, PackedWeight, Tensor], Tensor]
LinearExperts = Callable[[Tensor, PackedWeight, Tensor], Tensor]


@functools.cache
def failure(
    device: torch.device, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> str | None:
    """What is wrong with `ops` on `device`, as a sentence; None if nothing is.

    Compiles about four kernels the first time. An illegal memory access cannot be survived: CUDA
    refuses everything after it, and so the dense product that would replace the kernels too.
    """
    return examine(device, bits, group_size, symmetric, dtype, ops.linear, ops.linear_experts)


def examine(
    device: torch.device,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    linear: Linear,
    linear_experts: LinearExperts,
) -> str | None:
    """`failure` of the functions given; both are called as those of `ops` are."""
    generator = torch.Generator().manual_seed(0)
    return caught(
        lambda: (
            _linear_failure(
                device,
                _weight(bits, group_size, symmetric, dtype, generator),
                dtype,
                linear,
                generator,
            )
            or _experts_failure(
                device,
                [_weight(bits, group_size, symmetric, dtype, generator) for _ in range(EXPERTS)],
                dtype,
                linear_experts,
                generator,
            )
        )
    )


def caught(run: Callable[[], str | None]) -> str | None:
    """What `run` says, or that kernels do not run here."""
    from triton.errors import TritonError

    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    # RuntimeError: triton's "Triton Error [CUDA]" and missing C compiler, torch's CUDA errors.
    except (TritonError, RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"the kernels do not run here ({type(error).__name__}: {reason})."


def _weight(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, generator: torch.Generator
) -> PackedWeight:
    groups = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(N, groups, generator=generator) * 0.02 + 0.01).to(dtype)
    zero = torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8, generator=generator)
    return layout.pack(codes, scale, None if symmetric else zero, bits=bits, group_size=group_size)


def _linear_failure(
    device: torch.device,
    weight: PackedWeight,
    dtype: torch.dtype,
    linear: Linear,
    generator: torch.Generator,
) -> str | None:
    there = weight.to(device)
    bias = torch.randn(N, generator=generator).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, K, generator=generator).to(dtype)
        y, again = (linear(x.to(device), there, bias.to(device)).cpu() for _ in range(2))
        exact = reference.linear(x.double(), weight, bias)
        dense = reference.linear(x.to(device), there, bias.to(device)).cpu()
        if found := _disagreement(f"{rows} rows", y, again, dense, exact):
            return found
    return None


def _experts_failure(
    device: torch.device,
    experts: list[PackedWeight],
    dtype: torch.dtype,
    linear_experts: LinearExperts,
    generator: torch.Generator,
) -> str | None:
    weight = layout.stack(experts)
    there = weight.to(device)
    x = torch.randn(TOKENS, K, generator=generator).to(dtype)
    chosen = torch.randint(0, EXPERTS - 1, (TOKENS, TOP_K), generator=generator)  # one gets none
    y, again = (linear_experts(x.to(device), there, chosen.to(device)).cpu() for _ in range(2))
    exact = reference.linear_experts(x.double(), weight, chosen)
    dense = reference.linear_experts(x.to(device), there, chosen.to(device)).cpu()
    return _disagreement("stacked experts", y, again, dense, exact)


def _disagreement(what: str, y: Tensor, again: Tensor, dense: Tensor, exact: Tensor) -> str | None:
    """The bar: twice the error of the device's own dense product, and the same bits twice."""
    error, allowed = _distance(y, exact), 2 * _distance(dense, exact)
    if not error <= allowed:  # NaN fails too
        return f"the kernels compute wrongly here ({what}: relative error {error:.2g})."
    if not torch.equal(y, again):
        return f"the kernels give other bits on a second run ({what})."
    return None


def _distance(y: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    return ((y.double() - exact).norm() / exact.norm()).item()
