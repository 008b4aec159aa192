# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Packed W -> W in the activations' dtype, for prefill: the dense product then runs in cuBLAS."""

import triton
import triton.language as tl

from .grid import grid_pointers, load_grid, shrunk
from .unpack import load_words, rounded, weights


@triton.jit
def dequantize_kernel(
    qw_ptr, s_ptr, z_ptr, y_ptr, N, K, blocks,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """One program: one block, 64 rows and 128 columns. GROUP 0: one group per row."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float16 if DTYPE == tl.float32 else DTYPE
    P: tl.constexpr = 128 // GROUP if GROUP > 0 else 1
    lines, line = (blocks, block) if GROUP > 0 else (1, 0)
    words = load_words(qw_ptr + (tile * blocks + block) * (256 * BITS), BITS, 1, 0)
    s_ptrs, z_ptrs = grid_pointers(s_ptr, z_ptr, tile, line, lines, GROUP, 1)
    grid = load_grid(s_ptrs, z_ptrs, 0, None, 0, GROUP, SYMMETRIC, 1)
    v = weights(words, grid, GROUP, BITS, SYMMETRIC, False, s_ptr.dtype.element_ty, EXACT)
    n, p = tl.arange(0, 64), tl.arange(0, P)
    s = tl.load(s_ptr + (tile * lines + line) * (64 * P) + n[:, None] * P + p[None, :])  # (64, P)
    s = s.to(tl.float32) * shrunk(EXACT == tl.bfloat16)
    v = v.to(tl.float32).reshape((64, P, 128 // P)) * s[:, :, None]
    on, k = tl.program_id(0) * 64 + n, block * 128 + tl.arange(0, 128)
    mask = (on < N)[:, None] & (k < K)[None, :]
    out = y_ptr + on[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out, rounded(v.reshape((64, 128)), DTYPE), mask=mask)
