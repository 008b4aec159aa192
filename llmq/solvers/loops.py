"""The innermost loops of solvers: over the columns of a group or block, all rows at once.

On CPUs torch does a column of all rows at a time. A GPU would spend that time on launches, so on
NVIDIA ones a kernel of `llmq_kernels.rounding` has the whole loop, for a tile of rows per program;
results differ where a sum is added up in another order, and there only. The loops that code books
and super-blocks have for themselves are torch's everywhere.

All matrices are transposed, float32, one contiguous row of memory per column.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from llmq.backends.triton import Triton
from llmq.solvers.babai import round_block
from llmq_kernels import selfcheck

TINY = (96, 200)  # columns and rows of what is tried before kernels are used
AGREE = 0.99  # of its codes: sums in another order send a few halves to the other side
CLOSE = 1e-3  # relative difference of its errors


def round_columns(
    columns: Tensor, debt: Tensor, R: Tensor, grid: tuple[Tensor, Tensor], group: Tensor, qmax: int
) -> Tensor:
    """Round a block of columns, see `babai`.

    Args:
        columns: (C, N), at most 128; what each has lost takes its place.
        debt: (C, N), what the columns before these have lost; it is used up.
        R: (C, C), upper triangular.
        grid: scales and zero points, (groups, N) each.
        group: int64 (C,), of each column.
        qmax: the largest code.

    Returns:
        the codes, uint8 (C, N).
    """
    if by_kernels(columns.device):
        from llmq_kernels import solve

        return solve.round_columns(columns, debt, R, grid, group, qmax)
    return _round_columns(columns, debt, R, grid, group, qmax)


def trial_errors(columns: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, qmax: int) -> Tensor:
    """What GPTQ's pass over a group's columns (G, N) loses on each of C grids, (C, N).

    Args:
        columns: as they are when the group is reached; at most 128.
        U: (G, G), upper triangular, the group's block of the factor of H^-1.
        scales, zeros: (C, N).
        qmax: the largest code.
    """
    if by_kernels(columns.device):
        from llmq_kernels import solve

        return solve.trial_errors(columns.contiguous(), U, scales, zeros, qmax)
    return _trial_errors(columns, U, scales, zeros, qmax)


def moved_codes(codes: Tensor, away: Tensor, H: Tensor, qmax: int) -> Tensor:
    """Codes after the one of every row that gains most has moved, again until none gains.

    Args:
        codes: (C, N), at most 128.
        away: (C, N), how many steps each is from its best place, as long as no other moves.
        H: (C, C), symmetric, with a positive diagonal.
        qmax: the largest code.
    """
    if by_kernels(codes.device):
        from llmq_kernels import solve

        found = codes.clone()
        solve.move_codes(found, away, H, qmax)
        return found
    return _moved_codes(codes, away, H, qmax)


def by_kernels(device: torch.device) -> bool:
    """Whether kernels have these loops there; a GPU where they do not work is warned of, once."""
    return device.type == "cuda" and _work(device)


@functools.cache
def _work(device: torch.device) -> bool:
    why = Triton().why_not_on(device) or selfcheck.caught(lambda: disagreement(device))
    if why is not None:
        warnings.warn(f"Solving column by column, which is slow on a GPU: {why}", stacklevel=2)
    return why is None


def disagreement(device: torch.device) -> str | None:
    """What kernels compute otherwise than torch in a tiny problem, as a sentence."""
    from llmq_kernels import solve

    C, N = TINY
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x = drawn(4 * C, C) + drawn(4 * C, 1)
    H = x.T @ x / len(x)
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1).contiguous()
    W, debt, away = drawn(C, N), drawn(C, N) / 4, drawn(C, N)
    group = torch.arange(C, device=device) // 32
    grid = drawn(3, N).abs() / 4 + 0.1, (drawn(3, N) * 2 + 4).round().clamp(0, 7)
    codes = grid[1].repeat_interleave(32, 0)
    lost = W.clone(), W.clone()
    pairs = {
        "rounding": (
            solve.round_columns(lost[0], debt, R, grid, group, 7),
            _round_columns(lost[1], debt.clone(), R, grid, group, 7),
        ),
        "descent": (codes.clone(), _moved_codes(codes, away, H, 7)),
    }
    solve.move_codes(pairs["descent"][0], away, H, 7)
    for what, (found, expected) in pairs.items():
        if float((found == expected).double().mean()) < AGREE:
            return f"the kernels compute wrongly here ({what})."
    errors = solve.trial_errors(W, R, *grid, 7), _trial_errors(W, R, *grid, 7)
    if not bool(((errors[0] - errors[1]).abs() <= CLOSE * errors[1]).double().mean() >= AGREE):
        return "the kernels compute wrongly here (trials of grids)."
    return None


def _round_columns(
    columns: Tensor, debt: Tensor, R: Tensor, grid: tuple[Tensor, Tensor], group: Tensor, qmax: int
) -> Tensor:
    codes = torch.empty_like(columns, dtype=torch.uint8)
    groups = group.tolist()

    def nearest(number: int, wanted: Tensor) -> Tensor:
        scale, zero = (values[groups[number]] for values in grid)
        code = wanted.div_(scale).round_().add_(zero).clamp_(0, qmax)
        codes[number] = code
        return code.sub_(zero).mul_(scale)

    round_block(columns, debt, R, nearest)
    return codes


def _trial_errors(columns: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, qmax: int) -> Tensor:
    C, N = scales.shape
    columns = columns.repeat(1, C)  # (G, C * N)
    scale, zero = scales.reshape(-1), zeros.reshape(-1)
    total = torch.zeros_like(scale)
    for i, pivot in enumerate(U.diagonal().tolist()):
        w = columns[i]
        error = w.div(scale).round_().add_(zero).clamp_(0, qmax).sub_(zero).mul_(scale)
        torch.sub(w, error, out=error).mul_(1 / pivot)
        total.addcmul_(error, error)
        columns[i + 1 :].addr_(U[i, i + 1 :], error, alpha=-1)
    return total.view(C, N)


def _moved_codes(codes: Tensor, away: Tensor, H: Tensor, qmax: int) -> Tensor:
    pivots = H.diagonal()
    follows = H / pivots  # row j: by what a step of column j brings all columns nearer
    found = codes.T.contiguous()  # (N, C)
    codes, away = found.clone(), away.T.contiguous()
    rows = torch.arange(len(found), device=found.device)
    for _ in range(len(pivots)):
        steps = (codes + away).round_().clamp_(0, qmax).sub_(codes)
        gains = away.mul(2).sub_(steps).mul_(steps).mul_(pivots)
        most, columns = gains.max(1, keepdim=True)
        live = (most > 0).flatten().nonzero().flatten()
        if not len(live):
            break
        rows, codes, away = rows[live], codes[live], away[live]
        columns, steps = columns[live], steps[live].gather(1, columns[live])
        codes.scatter_add_(1, columns, steps)
        found[rows, columns.flatten()] += steps.flatten()
        away.addcmul_(follows[columns.flatten()], steps, value=-1)
    return found.T
