"""Round column after column, each from where it would make good what the earlier ones have lost.

With H = R R^T, R upper triangular, rounding a row w to q costs |e R|^2, e = w - q. Term j of e R,
the sum of e_i R_ij over i <= j, knows no later column than j; it would vanish if column j were

    w_j + (sum over i < j of e_i R_ij) / R_jj

and that is what is rounded. On the lattice of the rows of R this is Babai's nearest plane
algorithm (1986); Chen et al. 2025 (arXiv 2507.18553) show that GPTQ (Frantar et al. 2022, arXiv
2210.17323) is the same. GPTQ as published updates all later weights after every column, with the
factor of H^-1; from R alone no inverse is needed, and nothing changes but the column itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns that are rounded between two looks back at all earlier ones

Nearest = Callable[[int, Tensor], Tensor]  # column number, wanted (N,) -> rounded (N,)


class Pass:
    """One pass over the columns of a matrix.

    Args:
        W: (N, K).
        R: float32 (K, K), of H with rows and columns in the order of the pass; see
            `factor.factor`.
        order: (K,) int64, the columns of W in that order.

    Attributes:
        columns: float32 (K, N), weights in that order; of columns that were rounded, what was lost.
    """

    def __init__(self, W: Tensor, R: Tensor, order: Tensor):
        self.R = R
        self.columns = W.T[order].float()

    def run(self, nearest: Nearest) -> None:
        """Round all columns."""
        for start in range(0, len(self.columns), BLOCK):
            stop = min(start + BLOCK, len(self.columns))
            self.round(start, stop, self.debt(start, stop), nearest)

    def debt(self, start: int, stop: int) -> Tensor:
        """Terms start..stop of e R from the columns before `start`: (stop - start, N)."""
        return self.R[:start, start:stop].T @ self.columns[:start]

    def wanted(self, start: int, stop: int, debt: Tensor) -> Tensor:
        """Columns start..stop with which these terms would vanish: (stop - start, N), only to read.

        They are GPTQ's updated weights at the moment when the columns before `start` are rounded;
        from the first column on nothing is lost yet, and `debt` is not read.
        """
        columns = self.columns[start:stop]
        if start == 0:
            return columns
        own = self.R[start:stop, start:stop]
        return columns + torch.linalg.solve_triangular(own.T, debt, upper=False)

    def round(self, start: int, stop: int, debt: Tensor, nearest: Nearest) -> None:
        """Round columns start..stop; `debt` is used up."""
        own = self.R[start:stop, start:stop]
        round_block(self.columns[start:stop], debt, own, lambda i, w: nearest(start + i, w))


def round_block(columns: Tensor, debt: Tensor, R: Tensor, nearest: Nearest) -> None:
    """Round columns (C, N), which count from 0; what each has lost takes its place.

    Args:
        columns: see above.
        debt: (C, N), what the columns before these have lost; it is used up.
        R: (C, C), of these columns.
        nearest: rounds a column.
    """
    R = R.contiguous()
    shares = (1 / R.diagonal()).tolist()
    for i, column in enumerate(columns):
        column.sub_(nearest(i, torch.add(column, debt[i], alpha=shares[i])))
        debt[i + 1 :].addr_(R[i, i + 1 :], column)
