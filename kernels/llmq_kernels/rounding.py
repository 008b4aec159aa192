# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""The innermost loops of solvers: a few columns of a matrix, one after the other.

Rows do not interact there, so a program has a tile of them: what it needs of all its columns stays
in registers, (columns, rows), and the loop over columns runs on the GPU instead of launching some
operations on (rows,) per column. Matrices are transposed, float32, a row of memory per column.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits for fractions
FAR = tl.constexpr(1048576.0)  # beyond any code


@triton.jit
def nearest(x):
    """To the nearest integer, halves to even, of any finite x; beyond 2^20 in size it is 2^20."""
    return (tl.clamp(x, -FAR, FAR) + MAGIC) - MAGIC


@triton.jit
def row_of(tile, i, COLUMNS: tl.constexpr):
    """Row i of a tile (COLUMNS, rows)."""
    j = tl.arange(0, COLUMNS)
    return tl.sum(tl.where((j == i)[:, None], tile, 0.0), axis=0)


@triton.jit
def later(r_ptr, i, count, COLUMNS: tl.constexpr):
    """Row i of a matrix (count, count) right of its diagonal, and zeros, (COLUMNS,)."""
    j = tl.arange(0, COLUMNS)
    return tl.load(r_ptr + i * count + j, mask=(j > i) & (j < count), other=0.0)


@triton.jit
def round_kernel(
    column_ptr, debt_ptr, r_ptr, scale_ptr, zero_ptr, group_ptr, code_ptr, N, count, qmax,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Babai's pass over columns (count, N); what is lost takes their place."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    own = n < N
    debt = tl.load(
        debt_ptr + j[:, None] * N + n[None, :], mask=(j < count)[:, None] & own[None, :], other=0.0
    )
    for i in range(count):
        group = tl.load(group_ptr + i).to(tl.int64)
        scale = tl.load(scale_ptr + group * N + n, mask=own, other=1.0)
        zero = tl.load(zero_ptr + group * N + n, mask=own, other=0.0)
        w = tl.load(column_ptr + i * N + n, mask=own, other=0.0)
        wanted = w + row_of(debt, i, COLUMNS) / tl.load(r_ptr + i * count + i)
        code = tl.clamp(nearest(wanted / scale) + zero, 0.0, qmax)
        lost = w - (code - zero) * scale
        tl.store(column_ptr + i * N + n, lost, mask=own)
        tl.store(code_ptr + i * N + n, code.to(tl.uint8), mask=own)
        debt += later(r_ptr, i, count, COLUMNS)[:, None] * lost[None, :]


@triton.jit
def trials_kernel(
    column_ptr, u_ptr, scale_ptr, zero_ptr, error_ptr, N, count, qmax,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What GPTQ's pass over columns (count, N) loses on a grid; the second axis goes over grids."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * N + n
    j = tl.arange(0, COLUMNS)
    own = n < N
    scale = tl.load(scale_ptr + at, mask=own, other=1.0)
    zero = tl.load(zero_ptr + at, mask=own, other=0.0)
    columns = tl.load(
        column_ptr + j[:, None] * N + n[None, :],
        mask=(j < count)[:, None] & own[None, :],
        other=0.0,
    )
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(count):
        w = row_of(columns, i, COLUMNS)
        code = tl.clamp(nearest(w / scale) + zero, 0.0, qmax)
        error = (w - (code - zero) * scale) / tl.load(u_ptr + i * count + i)
        total += error * error
        columns -= later(u_ptr, i, count, COLUMNS)[:, None] * error[None, :]
    tl.store(error_ptr + at, total, mask=own)


@triton.jit
def moves_kernel(
    moved_ptr, away_ptr, follow_ptr, pivot_ptr, N, count, qmax,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Coordinate descent on codes (count, N): the code that gains most, again until none gains."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    at = j[:, None] * N + n[None, :]
    inside = (j < count)[:, None] & (n < N)[None, :]
    codes = tl.load(moved_ptr + at, mask=inside, other=0.0)
    away = tl.load(away_ptr + at, mask=inside, other=0.0)
    pivots = tl.load(pivot_ptr + j, mask=j < count, other=0.0)[:, None]
    move, moving = 0, True
    while (move < count) & moving:
        steps = tl.clamp(nearest(codes + away), 0.0, qmax) - codes
        gains = (2.0 * away - steps) * steps * pivots
        most = tl.max(gains, axis=0)
        first = tl.where(gains == most[None, :], j[:, None], COLUMNS)
        column = tl.minimum(tl.min(first, axis=0), count - 1)  # of those that gain most
        mine = j[:, None] == column[None, :]
        step = tl.where(most > 0.0, tl.sum(tl.where(mine, steps, 0.0), axis=0), 0.0)
        follows = tl.load(follow_ptr + column[None, :] * count + j[:, None], mask=inside, other=0.0)
        codes += tl.where(mine, step[None, :], 0.0)
        away -= follows * step[None, :]
        moving = tl.max(most, axis=0) > 0.0
        move += 1
    tl.store(moved_ptr + at, codes, mask=inside)
