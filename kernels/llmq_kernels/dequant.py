# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Packed W -> W in the activations' dtype, for prefill: the dense product then runs in cuBLAS."""

import triton
import triton.language as tl

from .unpack import centred, halves, load_words, rounded


@triton.jit
def _write(words, high, at, group, last, column, N, K,
           BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCKS: tl.constexpr,
           W: tl.constexpr):  # fmt: skip
    """Store the columns of `words`, which share one group; groups after `last` are padding."""
    s_ptr, z_ptr, y_ptr, on = at
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float16 if DTYPE == tl.float32 else DTYPE
    COLUMNS: tl.constexpr = BLOCKS * W * (16 if (BITS == 4 or BITS == 8) else 32)
    local = tl.arange(0, 64)
    group = tl.minimum(group, last)
    s = tl.load(s_ptr + group * 64 + local).to(tl.float32)
    z = s if SYMMETRIC else tl.load(z_ptr + group * 64 + local)
    v = centred(words, high, z, BITS, SYMMETRIC, EXACT, 1, BLOCKS, W).to(tl.float32)
    k = column + tl.arange(0, COLUMNS)
    mask = (on < N)[:, None] & (k < K)[None, :]
    out = y_ptr + on[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out, rounded(v * s[:, None], DTYPE), mask=mask)


@triton.jit
def dequantize_kernel(
    qw_ptr, s_ptr, z_ptr, y_ptr, N, K, blocks, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: 64 rows, one step (a group, or a block if that is more). GROUP 0: per row."""
    tile, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    UNIT: tl.constexpr = 64 if (BITS == 4 or BITS == 8) else 128
    WORDS: tl.constexpr = UNIT * BITS * 2
    STEP: tl.constexpr = BLOCKS * UNIT
    PARTS: tl.constexpr = UNIT // GROUP if (GROUP > 0 and GROUP < UNIT) else 1
    column = step * STEP
    group = column // GROUP if GROUP > 0 else 0
    last = groups - 1
    on = tl.program_id(0) * 64 + tl.arange(0, 64)
    s_ptr += tile * (groups * 64)
    z_ptr += tile * (groups * 64)
    block_ptr = qw_ptr + tile * (blocks * WORDS) + step * (BLOCKS * WORDS)
    words, high = load_words(block_ptr, BITS, 1, BLOCKS, 0)
    at = (s_ptr, z_ptr, y_ptr, on)
    if PARTS == 1:
        _write(words, high, at, group, last, column, N, K, BITS, SYMMETRIC, BLOCKS, 4)
    else:
        w0, w1 = halves(words, 1, 4)
        h0, h1 = halves(high, 1, 4)
        if PARTS == 2:
            _write(w0, h0, at, group, last, column, N, K, BITS, SYMMETRIC, 1, 2)
            _write(w1, h1, at, group + 1, last, column + GROUP, N, K, BITS, SYMMETRIC, 1, 2)
        else:
            w00, w01 = halves(w0, 1, 2)
            h00, h01 = halves(h0, 1, 2)
            w10, w11 = halves(w1, 1, 2)
            h10, h11 = halves(h1, 1, 2)
            _write(w00, h00, at, group, last, column, N, K, BITS, SYMMETRIC, 1, 1)
            _write(w01, h01, at, group + 1, last, column + 32, N, K, BITS, SYMMETRIC, 1, 1)
            _write(w10, h10, at, group + 2, last, column + 64, N, K, BITS, SYMMETRIC, 1, 1)
            _write(w11, h11, at, group + 3, last, column + 96, N, K, BITS, SYMMETRIC, 1, 1)
