# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""y = x @ W.T with packed W: one Triton kernel for decoding, small batches and stacked experts.

Operands are swapped: rows of W are the matrix instruction's left operand and stay in registers,
x transposed is the right one. Each group's partial product is scaled in the float32 accumulator.
Programs that share an output tile along K store float32 partial sums; the last to arrive adds
them in index order, so results do not depend on scheduling.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .grid import grid_pointers, load_grid, scale_of, shrunk
from .unpack import INTERPRETED, load_words, rounded, weights


@triton.jit
def _activations(x_ptr, live, column, K, EVEN_K: tl.constexpr, COLUMNS: tl.constexpr):
    """x transposed: (COLUMNS, BM), zero outside."""
    k = column + tl.arange(0, COLUMNS)[:, None]
    mask = live[None, :] if EVEN_K else live[None, :] & (k < K)
    x = tl.load(x_ptr + k, mask=mask, other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _step(acc, words, grid, x_ptr, live, column, K, BITS: tl.constexpr, GROUP: tl.constexpr,
          SYMMETRIC: tl.constexpr, STORED: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """acc (BN, BM) += W @ x.T over one block: 128 columns."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    v = weights(words, grid, GROUP, BITS, SYMMETRIC, GROUP == 32, STORED, DTYPE)
    if GROUP == 64:
        left, right = tl.split(v.reshape((v.shape[0], 2, 64)).permute((0, 2, 1)))
        x = _activations(x_ptr, live, column, K, EVEN_K, 64)
        acc += tl.dot(left, x) * scale_of(grid[2], 0, STORED)[:, None]
        x = _activations(x_ptr, live, column + 64, K, EVEN_K, 64)
        return acc + tl.dot(right, x) * scale_of(grid[2], 1, STORED)[:, None]
    else:
        x = _activations(x_ptr, live, column, K, EVEN_K, 128)
        if GROUP == 128:
            return acc + tl.dot(v, x) * scale_of(grid[2], 0, STORED)[:, None]
        else:
            return tl.dot(v, x, acc)


@triton.jit
def _prefetch(block_ptr):
    """Weights do not depend on the previous kernel: fetch the first 16 KB while it ends."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [block_ptr + tl.arange(0, 128) * 32],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "blocks", "trips"])  # or each class of them would compile
def linear_kernel(
    x_ptr, qw_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, pair_ptr, expert_ptr,
    M, N, K, blocks, trips, stride_x,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One program: rows pn of W, a share pk of K, rows pm of x. GROUP 0: one group per row.

    TOP_K 0: dense. Otherwise program pm computes the pairs (token, chosen expert) listed at
    pair_ptr[pm * BLOCK_M:], all of expert expert_ptr[pm]; M counts pairs; x row = pair // TOP_K.
    """
    pn, pk, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STORED: tl.constexpr = s_ptr.dtype.element_ty
    WORDS: tl.constexpr = 256 * BITS  # of a block
    share = tl.cdiv(trips, tl.num_programs(1))
    begin = pk * share
    end = tl.minimum(begin + share, trips)
    tile = pn.to(tl.int64) * TILES
    om = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    if TOP_K > 0:
        expert = tl.load(expert_ptr + pm)
        if expert < 0:
            return
        tile += expert.to(tl.int64) * (tl.num_programs(0) * TILES)
        om = tl.load(pair_ptr + om)
    live = om < M
    rows = tl.where(live, om // TOP_K, 0) if TOP_K > 0 else om
    block_ptr = qw_ptr + (tile * blocks + begin * UNROLL) * WORDS
    if PDL:
        _prefetch(block_ptr)
        gdc_wait()
    x_ptr += rows[None, :].to(tl.int64) * stride_x
    lines = blocks if GROUP > 0 else 1
    first = begin * UNROLL if GROUP > 0 else 0
    s_ptrs, z_ptrs = grid_pointers(s_ptr, z_ptr, tile, first, lines, GROUP, TILES)
    some = end - begin if GROUP > 0 else None
    grid = load_grid(s_ptrs, z_ptrs, 0, some, lines * 64, GROUP, SYMMETRIC, TILES)
    acc = tl.zeros((TILES * 64, BLOCK_M), tl.float32)
    for trip in range(begin, end):
        for u in tl.static_range(UNROLL):
            words = load_words(block_ptr + u * WORDS, BITS, TILES, blocks * WORDS)
            now = grid
            if GROUP > 0:  # the next block's, which hides their latency behind this product
                left = end - 1 - trip if u == UNROLL - 1 else None
                at = (u + 1) * 64
                grid = load_grid(s_ptrs, z_ptrs, at, left, lines * 64, GROUP, SYMMETRIC, TILES)
            column = (trip * UNROLL + u) * 128
            acc = _step(
                acc, words, now, x_ptr, live, column, K, BITS, GROUP, SYMMETRIC, STORED, EVEN_K
            )
        block_ptr += UNROLL * WORDS
        s_ptrs += UNROLL * 64
        z_ptrs += UNROLL * 32
    if PDL:
        gdc_launch_dependents()
    acc *= shrunk(x_ptr.dtype.element_ty == tl.bfloat16)
    if GROUP == 0:
        acc *= scale_of(grid[2], 0, STORED)[:, None]
    _finish(acc, bias_ptr, y_ptr, partial_ptr, counter_ptr, om, live, N, BIAS, SPLIT)


@triton.jit
def _finish(acc, bias_ptr, y_ptr, partial_ptr, counter_ptr, om, live, N,
            BIAS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Add the bias and write rows `om` of y, or hand a partial sum over."""
    on = tl.program_id(0) * acc.shape[0] + tl.arange(0, acc.shape[0])
    bias = tl.load(bias_ptr + on, mask=on < N, other=0.0).to(tl.float32) if BIAS else 0.0
    mask = live[None, :] & (on < N)[:, None]
    y_ptr += om[None, :].to(tl.int64) * N + on[:, None]
    if SPLIT:
        _reduce(acc, bias, y_ptr, mask, partial_ptr, counter_ptr, BIAS)
    else:
        _store(acc, bias, y_ptr, mask, BIAS)


@triton.jit
def _store(acc, bias, y_ptr, mask, BIAS: tl.constexpr):
    if BIAS:
        acc += bias[:, None]
    tl.store(y_ptr, rounded(acc, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce(acc, bias, y_ptr, mask, partial_ptr, counter_ptr, BIAS: tl.constexpr):
    """Store a partial sum; the last program of a tile adds all of them in order."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    split = tl.num_programs(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    partial_ptr += tile.to(tl.int64) * split * (BN * BM)
    inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(partial_ptr + tl.program_id(1) * (BN * BM) + inside, acc)
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    if arrived == split - 1:
        total = tl.zeros((BN, BM), tl.float32)
        for j in range(split):
            total += tl.load(partial_ptr + j * (BN * BM) + inside, cache_modifier=".cg")
        _store(total, bias, y_ptr, mask, BIAS)
        tl.atomic_xchg(counter_ptr + tile, 0)  # ready for the next launch, graph replays included
