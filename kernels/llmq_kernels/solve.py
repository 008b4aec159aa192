"""Host side of the kernels in `rounding`: shapes, tiles, launches. Imported on first use only.

All matrices are transposed, one contiguous row of memory per column of a layer's matrix, float32
on a GPU; at most 128 columns at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import solver_tile
from .rounding import moves_kernel, round_kernel, trials_kernel


def round_columns(
    columns: Tensor, debt: Tensor, R: Tensor, grid: tuple[Tensor, Tensor], group: Tensor, qmax: int
) -> Tensor:
    """Round column after column, each from where it would make good what was lost before.

    Args:
        columns: (C, N), contiguous; what each has lost takes its place.
        debt: (C, N), what the columns before these have lost; it stays as it is.
        R: (C, C), upper triangular.
        grid: scales and zero points, (groups, N) each.
        group: integer (C,), of each column.
        qmax: the largest code.

    Returns:
        the codes, uint8 (C, N).
    """
    count, N = columns.shape
    codes = torch.empty_like(columns, dtype=torch.uint8)
    shape = solver_tile(count)
    round_kernel[(-(-N // shape["ROWS"]),)](
        columns, debt.contiguous(), R.contiguous(), *grid, group, codes, N, count, float(qmax),
        **shape,
    )  # fmt: skip
    return codes


def trial_errors(columns: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, qmax: int) -> Tensor:
    """What GPTQ's pass over columns loses on each of several grids.

    Args:
        columns: (C, N), contiguous.
        U: (C, C), upper triangular.
        scales, zeros: (grids, N).
        qmax: the largest code.

    Returns:
        (grids, N).
    """
    count, N = columns.shape
    errors = torch.empty_like(scales)
    shape = solver_tile(count)
    trials_kernel[(-(-N // shape["ROWS"]), len(scales))](
        columns, U.contiguous(), scales.contiguous(), zeros.contiguous(), errors, N, count,
        float(qmax), **shape,
    )  # fmt: skip
    return errors


def move_codes(codes: Tensor, away: Tensor, H: Tensor, qmax: int) -> None:
    """Move the code of every row that gains most, again until none gains.

    Args:
        codes: (C, N), contiguous; changed in place.
        away: (C, N), how many steps each is from its best place if no other moves.
        H: (C, C), symmetric, with a positive diagonal.
        qmax: the largest code.
    """
    count, N = codes.shape
    shape = solver_tile(count)
    pivots = H.diagonal().contiguous()
    moves_kernel[(-(-N // shape["ROWS"]),)](
        codes, away.contiguous(), (H / pivots).contiguous(), pivots, N, count, float(qmax), **shape
    )
