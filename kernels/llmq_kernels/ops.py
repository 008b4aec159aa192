"""The kernels as torch operators: compile, CUDA graphs and gradients of the input work.

On a CPU the operators compute `reference`; on CUDA they choose a launch from host numbers
(`plan.choose`), never by measuring, and synchronize nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plan as plans, reference
from .layout import PackedWeight

SLAB_BYTES = 32 << 20  # a dequantized slab stays in the second-level cache until it is multiplied
FUSED_DTYPES = (torch.bfloat16, torch.float16)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """x @ W.T + bias.

    Args:
        x: (..., K); bf16 and fp16 have the fast kernel.
        weight: one matrix (N, K).
        bias: (N,) or None.
        pdl: programmatic dependent launch (sm_90 and later): the kernel starts fetching weights
            while the previous kernel of the stream ends.

    Returns:
        (..., N) in x's dtype. Differentiable in `x` and `bias`.
    """
    N, K = weight.shape
    y = _linear(
        x.reshape(-1, K), weight.qweight, weight.scale, weight.zero, bias, weight.counters,
        weight.bits, weight.group_size, N, pdl,
    )  # fmt: skip
    return y.view(*x.shape[:-1], N)


def linear_experts(x: Tensor, weight: PackedWeight, chosen: Tensor) -> Tensor:
    """Every row of x through the experts chosen for it, in one launch.

    Args:
        x: (T, K), or (T * top_k, K) when every chosen expert has an input row of its own.
        weight: E stacked matrices (N, K).
        chosen: integer (T, top_k), on x's device; never copied to the host.

    Returns:
        (T * top_k, N) in x's dtype. Not differentiable.
    """
    return _linear_experts(
        x, weight.qweight, weight.scale, weight.zero, weight.counters, chosen,
        weight.bits, weight.group_size, weight.shape[0],
    )  # fmt: skip


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in `dtype`."""
    N, K = weight.shape
    return _dequantize(
        weight.qweight, weight.scale, weight.zero, weight.bits, weight.group_size, N, K, dtype
    )


def fused(x: Tensor, scale: Tensor, group_size: int) -> bool:
    """Whether the fused kernel knows these dtypes: in groups of 32 it takes 16-bit scales only."""
    return x.dtype in FUSED_DTYPES and (group_size != 32 or scale.element_size() == 2)


def _weight(
    qweight, scale, zero, counters, bits: int, group_size: int, N: int, K: int
) -> PackedWeight:
    return PackedWeight(qweight, scale, zero, counters, bits, group_size, (N, K))


@torch.library.custom_op("llmq_kernels::linear", mutates_args=())
def _linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    counters: Tensor, bits: int, group_size: int, N: int, pdl: bool,
) -> Tensor:  # fmt: skip
    # `counters` is zero before and after each launch, hence not declared as mutated.
    weight = _weight(qweight, scale, zero, counters, bits, group_size, N, x.shape[1])
    if x.device.type != "cuda":
        return reference.linear(x, weight, bias)
    plan = None
    if fused(x, scale, group_size) and x.shape[0]:
        plan = plans.choose(gpu(x.device), bits, group_size, N, x.shape[1], x.shape[0])
    with torch.cuda.device(x.device):  # triton launches on the current device, not on x's
        if plan is None:
            return dense(x, weight, bias)
        from . import launch  # triton: only where it runs

        return launch.linear(x.contiguous(), weight, bias, plan, pdl=pdl)


@_linear.register_fake
def _(x, qweight, scale, zero, bias, counters, bits, group_size, N, pdl):
    return x.new_empty(x.shape[0], N)


def _save(ctx, inputs, output) -> None:
    x, qweight, scale, zero, bias, _, bits, group_size, N, _ = inputs
    ctx.save_for_backward(qweight, scale, *(() if zero is None else (zero,)))
    ctx.format = bits, group_size, N, x.shape[1]
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    qweight, scale, *zero = ctx.saved_tensors
    W = _dequantize(qweight, scale, zero[0] if zero else None, *ctx.format, grad.dtype)
    of_bias = grad.sum(0) if ctx.has_bias else None
    return grad @ W, None, None, None, of_bias, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("llmq_kernels::linear_experts", mutates_args=())
def _linear_experts(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, counters: Tensor,
    chosen: Tensor, bits: int, group_size: int, N: int,
) -> Tensor:  # fmt: skip
    weight = _weight(qweight, scale, zero, counters, bits, group_size, N, x.shape[1])
    pairs, experts = chosen.numel(), qweight.shape[0]
    fits = fused(x, scale, group_size) and plans.fits(x.shape[1]) and pairs > 0
    if x.device.type != "cuda" or not fits:
        return reference.linear_experts(x, weight, chosen)
    from . import launch

    rows = max(1, pairs // min(pairs, experts))
    plan = plans.closed_form(gpu(x.device), bits, group_size, N, x.shape[1], min(rows, 64))
    with torch.cuda.device(x.device):
        return launch.linear_experts(x.contiguous(), weight, chosen, plan)


@_linear_experts.register_fake
def _(x, qweight, scale, zero, counters, chosen, bits, group_size, N):
    return x.new_empty(chosen.numel(), N)


@torch.library.custom_op("llmq_kernels::dequantize", mutates_args=())
def _dequantize(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int,
    N: int, K: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = _weight(qweight, scale, zero, qweight, bits, group_size, N, K)
    if qweight.device.type != "cuda" or dtype not in (*FUSED_DTYPES, torch.float32):
        return reference.dequantize(weight, dtype)
    from . import launch

    with torch.cuda.device(qweight.device):
        return launch.dequantize(weight, dtype)


@_dequantize.register_fake
def _(qweight, scale, zero, bits, group_size, N, K, dtype):
    return qweight.new_empty(N, K, dtype=dtype)


def dense(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Dequantize slab by slab and multiply densely: many rows, or shapes the kernel cannot take."""
    if x.dtype not in (*FUSED_DTYPES, torch.float32):
        return reference.linear(x, weight, bias)
    from . import launch

    N, K = weight.shape
    y = x.new_empty(x.shape[0], N)
    tiles = max(1, SLAB_BYTES // (plans.TILE * K * x.element_size()))
    slab = x.new_empty(min(N, tiles * plans.TILE), K)
    for tile in range(0, weight.qweight.shape[0], tiles):
        start = tile * plans.TILE
        rows = min(N - start, slab.shape[0])
        W = launch.dequantize(row_tiles(weight, tile, tiles), x.dtype, out=slab[:rows])
        torch.mm(x, W.t(), out=y[:, start : start + rows])
    return y if bias is None else y.add_(bias)


def row_tiles(weight: PackedWeight, first: int, count: int) -> PackedWeight:
    """`count` row tiles of a weight from tile `first` on, as views."""
    part = slice(first, first + count)
    N = min(weight.shape[0] - first * plans.TILE, count * plans.TILE)
    return PackedWeight(
        weight.qweight[part],
        weight.scale[part],
        None if weight.zero is None else weight.zero[part],
        weight.counters,
        weight.bits,
        weight.group_size,
        (N, weight.shape[1]),
    )


def gpu(device: torch.device) -> plans.Gpu:
    """What the choice of a launch may depend on."""
    found = torch.cuda.get_device_properties(device)
    return plans.Gpu(found.name, (found.major, found.minor), found.multi_processor_count)
