"""Host side of the Triton kernels: allocate, count programs, launch. Imported on first use only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dequant import dequantize_kernel
from .gemm import linear_kernel
from .layout import PackedWeight
from .plan import TILE, UNIT, Plan


class Routing(NamedTuple):
    """Which rows of x meet which expert, in blocks of one expert each (see `route`)."""

    pairs: (
        Tensor  # int32 (blocks * block_m,), pair = token * top_k + choice; >= number of pairs: none
    )
    experts: Tensor  # int32 (blocks,), -1: nothing to do
    total: int  # number of pairs
    top_k: int  # pairs per row of x


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    plan: Plan,
    *,
    pdl: bool = False,
    routing: Routing | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Launch the fused kernel.

    Args:
        x: (M, K), bf16 or fp16, rows contiguous.
        weight: (N, K), or stacked experts with a `routing`.
        bias: (N,) or None.
        plan: the launch, from `plan.choose`.
        pdl: start while the previous kernel of the stream ends (programmatic dependent launch).
        routing: rows per expert; the result then has one row per pair.
        out_dtype: of the result (default: x's).

    Returns:
        (M, N), or (pairs, N).
    """
    N, K = weight.shape
    M = x.shape[0] if routing is None else routing.total
    m_blocks = -(-M // plan.block_m) if routing is None else routing.experts.numel()
    row_tiles, blocks = weight.qweight.shape[-3:-1]
    unroll = plan.unroll if blocks % plan.unroll == 0 else 1
    tiles = plan.tiles if row_tiles % plan.tiles == 0 else 1
    n_blocks = row_tiles // tiles
    split = plan.split if n_blocks * m_blocks <= weight.counters.numel() else 1
    y = x.new_empty(M, N, dtype=out_dtype)
    partial = y
    if split > 1:
        sums = n_blocks * m_blocks * split * tiles * TILE * plan.block_m
        partial = x.new_empty(sums, dtype=torch.float32)
    unused = weight.counters
    zero = weight.scale if weight.zero is None else weight.zero
    pairs, experts = (unused, unused) if routing is None else (routing.pairs, routing.experts)
    constants: dict[str, Any] = {
        "BIAS": bias is not None,
        "TILES": tiles,
        "BLOCK_M": plan.block_m,
        "UNROLL": unroll,
        "SPLIT": split > 1,
        "EVEN_K": K % UNIT == 0,
        "PDL": pdl,
        "TOP_K": 0 if routing is None else routing.top_k,
    }
    linear_kernel[(n_blocks, split, m_blocks)](
        x, weight.qweight, weight.scale, zero, x if bias is None else bias, y, partial,
        weight.counters, pairs, experts, M, N, K, blocks, blocks // unroll, x.stride(0),
        **_format(weight), **constants, **_options(plan, pdl),
    )  # fmt: skip
    return y


def _options(plan: Plan, pdl: bool) -> dict[str, Any]:
    """What the compiler and the driver are told about a launch."""
    options: dict[str, Any] = {"num_warps": plan.warps, "num_stages": plan.stages}
    if plan.maxnreg is not None:
        options["maxnreg"] = plan.maxnreg
    return options | {"launch_pdl": True} if pdl else options


def _format(weight: PackedWeight) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "BITS": weight.bits,
        "GROUP": max(0, weight.group_size),
        "SYMMETRIC": weight.zero is None,
        "enable_fp_fusion": True,  # what triton 3.6 does unasked, and 3.9 warns about
    }


def dequantize(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Launch the dequantizing kernel: the matrix (N, K) in bf16, fp16 or float32.

    Args:
        weight: one matrix.
        dtype: of the result.
        out: (N, K) of that dtype, contiguous, to write to.
    """
    N, K = weight.shape
    y = weight.scale.new_empty(N, K, dtype=dtype) if out is None else out
    row_tiles, blocks = weight.qweight.shape[-3:-1]
    zero = weight.scale if weight.zero is None else weight.zero
    options: dict[str, Any] = {**_format(weight), "num_warps": 4}
    dequantize_kernel[(row_tiles, blocks)](
        weight.qweight, weight.scale, zero, y, N, K, blocks, **options
    )
    return y


def linear_experts(
    x: Tensor, weight: PackedWeight, chosen: Tensor, plan: Plan, **options
) -> Tensor:
    """Launch the grouped kernel: (T * top_k, N). `x` is (T, K) or (T * top_k, K)."""
    routing = route(chosen, weight.qweight.shape[0], plan.block_m, chosen.numel() // x.shape[0])
    return linear(x, weight, None, plan, routing=routing, **options)


def route(chosen: Tensor, experts: int, block_m: int, top_k: int) -> Routing:
    """Group the pairs (token, choice) by expert into blocks of at most `block_m`.

    Tensor operations only: the number of blocks is a bound known on the host, so nothing waits
    for the device and the whole can be captured in a CUDA graph.

    Args:
        chosen: integer (T, choices), the experts of each token.
        experts: how many there are.
        block_m: pairs per block.
        top_k: pairs per row of x.
    """
    flat = chosen.flatten()
    count = flat.numel()
    blocks = min(count, experts + count // block_m)
    order = flat.argsort(stable=True)  # pairs, sorted by expert
    load = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    load.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    needed = (load + block_m - 1) // block_m  # blocks per expert
    last = needed.cumsum(0)
    index = torch.arange(blocks, device=flat.device)
    owner = torch.searchsorted(last, index, right=True)  # == experts: beyond the last block
    owned = owner < experts
    safe = owner.clamp(max=experts - 1)
    within = index - (last - needed)[safe]  # which of its expert's blocks
    at = within.unsqueeze(1) * block_m + torch.arange(block_m, device=flat.device)
    valid = owned.unsqueeze(1) & (at < load[safe].unsqueeze(1))
    source = ((load.cumsum(0) - load)[safe].unsqueeze(1) + at).clamp(max=count - 1)
    pairs = torch.where(valid, order[source], count)
    return Routing(
        pairs.to(torch.int32).flatten(),
        torch.where(owned, owner, -1).to(torch.int32),
        count,
        top_k,
    )
