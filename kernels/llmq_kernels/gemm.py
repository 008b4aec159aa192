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

from .unpack import INTERPRETED, centred, halves, load_words, rounded


@triton.jit
def _rows(ptrs, tile_stride, TILES: tl.constexpr):
    """One number per row: (TILES * 64,), from pointers to the first tile's (64,).

    Loads of fewer elements than threads are cheap enough for the compiler to issue them in the
    layout that the accumulator wants; a wider one would travel through shared memory.
    """
    values = tl.load(ptrs)
    if TILES == 2:
        values = tl.join(values, tl.load(ptrs + tile_stride)).permute((1, 0)).reshape((128,))
    return values


@triton.jit
def _grid(s_ptrs, z_ptrs, g, groups, I: tl.constexpr, PER_TRIP: tl.constexpr,
          EVEN_K: tl.constexpr, SYMMETRIC: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Scale (as stored) and zero point of group g + I; the pointers are at group g."""
    if EVEN_K and I < PER_TRIP:
        at = I * 64
    else:  # the next trip's first group, or padding: stay inside
        at = (tl.minimum(g + I, groups - 1) - g) * 64
    s = _rows(s_ptrs + at, groups * 64, TILES)
    if SYMMETRIC:
        return s, s
    else:
        return s, _rows(z_ptrs + at, groups * 64, TILES)


@triton.jit
def _group(acc, words, high, s, z, x_ptr, live, column, K,
           BITS: tl.constexpr, SYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
           EVEN_K: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
           W: tl.constexpr):  # fmt: skip
    """acc (BN, BM) += s * ((codes - zero) @ x.T) over the columns of `words`."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = _activations(x_ptr, live, column, K, EVEN_K, BLOCKS * W * (16 if BITS >= 4 else 32))
    v = centred(words, high, z, BITS, SYMMETRIC, DTYPE, TILES, BLOCKS, W)
    if SCALED:
        return acc + tl.dot(v, x) * s.to(tl.float32)[:, None]
    else:
        return tl.dot(v, x, acc)


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
def _scaled(words, high, s, z, DTYPE: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
            TILES: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Dequantized columns of one group, rounded to DTYPE (held in float32 when interpreted)."""
    v = centred(words, high, z, BITS, SYMMETRIC, DTYPE, TILES, 1, W)
    if INTERPRETED:
        s = rounded(s.to(tl.float32), DTYPE).to(tl.float32)
        return rounded(v * s[:, None], DTYPE).to(tl.float32)
    else:
        return v * s.to(DTYPE)[:, None]


@triton.jit
def _small_groups(words, high, s, z, g, groups, s_ptrs, z_ptrs,
                  DTYPE: tl.constexpr, I: tl.constexpr, PER_TRIP: tl.constexpr,
                  EVEN_K: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
                  TILES: tl.constexpr):  # fmt: skip
    """One block in groups of 32, dequantized: scaling the accumulator 4 times would cost more.

    Returns the operand (BN, columns) and the next block's first scale and zero point.
    """
    w0, w1 = halves(words, TILES, 4)
    h0, h1 = halves(high, TILES, 4)
    s1, z1 = _grid(s_ptrs, z_ptrs, g, groups, I + 1, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
    s2, z2 = _grid(s_ptrs, z_ptrs, g, groups, I + 2, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
    if BITS >= 4:
        v0 = _scaled(w0, h0, s, z, DTYPE, BITS, SYMMETRIC, TILES, 2)
        v1 = _scaled(w1, h1, s1, z1, DTYPE, BITS, SYMMETRIC, TILES, 2)
        return _beside(v0, v1), s2, z2
    else:
        s3, z3 = _grid(s_ptrs, z_ptrs, g, groups, I + 3, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
        s4, z4 = _grid(s_ptrs, z_ptrs, g, groups, I + 4, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
        w00, w01 = halves(w0, TILES, 2)
        h00, h01 = halves(h0, TILES, 2)
        w10, w11 = halves(w1, TILES, 2)
        h10, h11 = halves(h1, TILES, 2)
        v0 = _scaled(w00, h00, s, z, DTYPE, BITS, SYMMETRIC, TILES, 1)
        v1 = _scaled(w01, h01, s1, z1, DTYPE, BITS, SYMMETRIC, TILES, 1)
        v2 = _scaled(w10, h10, s2, z2, DTYPE, BITS, SYMMETRIC, TILES, 1)
        v3 = _scaled(w11, h11, s3, z3, DTYPE, BITS, SYMMETRIC, TILES, 1)
        return _beside(_beside(v0, v1), _beside(v2, v3)), s4, z4


@triton.jit
def _beside(left, right):
    """(N, A), (N, A) -> (N, 2 A)"""
    return tl.join(left, right).permute((0, 2, 1)).reshape((left.shape[0], 2 * left.shape[1]))


@triton.jit
def _step(acc, words, high, s, z, g, groups, s_ptrs, z_ptrs, x_ptr, live, column, K,
          I: tl.constexpr, PER_TRIP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          SYMMETRIC: tl.constexpr, EVEN_K: tl.constexpr, TILES: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    """acc (BN, BM) += W @ x.T over BLOCKS blocks, from group g + I on.

    `s` and `z` are that group's; the next ones are loaded before each product, which hides their
    latency. Returns (acc, s, z).
    """
    COLUMNS: tl.constexpr = BLOCKS * (64 if (BITS == 4 or BITS == 8) else 128)
    if GROUP == 32:
        x = _activations(x_ptr, live, column, K, EVEN_K, COLUMNS)
        v, s, z = _small_groups(words, high, s, z, g, groups, s_ptrs, z_ptrs,
                                x_ptr.dtype.element_ty, I, PER_TRIP, EVEN_K, BITS, SYMMETRIC,
                                TILES)  # fmt: skip
        return tl.dot(v, x, acc), s, z
    elif GROUP > 0 and GROUP < COLUMNS:
        w0, w1 = halves(words, TILES, 4)
        h0, h1 = halves(high, TILES, 4)
        s1, z1 = _grid(s_ptrs, z_ptrs, g, groups, I + 1, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
        s2, z2 = _grid(s_ptrs, z_ptrs, g, groups, I + 2, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
        acc = _group(acc, w0, h0, s, z, x_ptr, live, column, K,
                     BITS, SYMMETRIC, True, EVEN_K, TILES, 1, 2)  # fmt: skip
        acc = _group(acc, w1, h1, s1, z1, x_ptr, live, column + GROUP, K,
                     BITS, SYMMETRIC, True, EVEN_K, TILES, 1, 2)  # fmt: skip
        return acc, s2, z2
    elif GROUP > 0:
        s1, z1 = _grid(s_ptrs, z_ptrs, g, groups, I + 1, PER_TRIP, EVEN_K, SYMMETRIC, TILES)
        acc = _group(acc, words, high, s, z, x_ptr, live, column, K,
                     BITS, SYMMETRIC, True, EVEN_K, TILES, BLOCKS, 4)  # fmt: skip
        return acc, s1, z1
    else:
        acc = _group(acc, words, high, s, z, x_ptr, live, column, K,
                     BITS, SYMMETRIC, False, EVEN_K, TILES, BLOCKS, 4)  # fmt: skip
        return acc, s, z


@triton.jit
def linear_kernel(
    x_ptr, qw_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, pair_ptr, expert_ptr,
    M, N, K, blocks, groups, trips, stride_x,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One program: rows pn of W, a share pk of K, rows pm of x. GROUP 0: one group per row.

    TOP_K 0: dense. Otherwise program pm computes the pairs (token, chosen expert) listed at
    pair_ptr[pm * BLOCK_M:], all of expert expert_ptr[pm]; M counts pairs; x row = pair // TOP_K.
    """
    pn, pk, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BN: tl.constexpr = TILES * 64
    UNIT: tl.constexpr = 64 if (BITS == 4 or BITS == 8) else 128
    WORDS: tl.constexpr = UNIT * BITS * 2
    STEP: tl.constexpr = BLOCKS * UNIT

    share = tl.cdiv(trips, tl.num_programs(1))
    begin = pk * share
    end = tl.minimum(begin + share, trips)
    tile = pn.to(tl.int64) * TILES
    if TOP_K > 0:
        expert = tl.load(expert_ptr + pm)
        if expert < 0:
            return
        tile += expert.to(tl.int64) * (tl.num_programs(0) * TILES)
        om = tl.load(pair_ptr + pm * BLOCK_M + tl.arange(0, BLOCK_M))
        live = om < M
        rows = tl.where(live, om // TOP_K, 0)
    else:
        om = pm * BLOCK_M + tl.arange(0, BLOCK_M)
        live = om < M
        rows = om
    on = pn * BN + tl.arange(0, BN)
    block_ptr = qw_ptr + tile * (blocks * WORDS) + begin * (UNROLL * BLOCKS * WORDS)
    if PDL:  # weights do not depend on the previous kernel: fetch the first 16 KB while it ends
        ahead = block_ptr + tl.arange(0, 128) * 32
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ahead],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    PER_STEP: tl.constexpr = STEP // GROUP if GROUP > 0 else 0
    PER_TRIP: tl.constexpr = PER_STEP * UNROLL
    g = begin * PER_TRIP
    s_ptrs = s_ptr + tile * (groups * 64) + g * 64 + tl.arange(0, 64)
    z_ptrs = z_ptr + tile * (groups * 64) + g * 64 + tl.arange(0, 64)
    x_ptr += rows[None, :].to(tl.int64) * stride_x
    s, z = _grid(s_ptrs, z_ptrs, g, groups, 0, 0, EVEN_K, SYMMETRIC, TILES)
    acc = tl.zeros((BN, BLOCK_M), tl.float32)
    for trip in range(begin, end):
        for u in tl.static_range(UNROLL):
            words, high = load_words(
                block_ptr + u * BLOCKS * WORDS, BITS, TILES, BLOCKS, blocks * WORDS
            )
            acc, s, z = _step(
                acc, words, high, s, z, g, groups, s_ptrs, z_ptrs, x_ptr, live,
                trip * (UNROLL * STEP) + u * STEP, K, u * PER_STEP, PER_TRIP,
                BITS, GROUP, SYMMETRIC, EVEN_K, TILES, BLOCKS,
            )  # fmt: skip
        block_ptr += UNROLL * BLOCKS * WORDS
        s_ptrs += PER_TRIP * 64
        z_ptrs += PER_TRIP * 64
        g += PER_TRIP
    if PDL:
        gdc_launch_dependents()
    if GROUP == 0:
        acc *= s.to(tl.float32)[:, None]
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
