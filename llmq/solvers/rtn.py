"""Round to nearest: every weight on its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid, round_to_grid
from llmq.solvers.grid import by_block, search_grid


@dataclass(frozen=True)
class RTN:
    """Round to nearest on one grid per group.

    Args:
        search: choose the grid by the error of the layer's output, measured with the diagonal
            blocks of H (for AWQ this is its clip search: Lin et al. 2023, arXiv 2306.00978,
            section 3, with the exact expected output error in place of sampled outputs); else
            the grid that just covers the group, and H is not used.
    """

    search: bool = False

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """See `solvers.Solver.solve`."""
        groups = grouped(W.float(), scheme)  # (N, K/G, G)
        if self.search:
            scale, zero = search_grid(groups, scheme, W.dtype, by_block(H, groups.shape[-1]))
        else:
            scale, zero = minmax_grid(groups, scheme, W.dtype)
        return round_to_grid(W, scale, zero, scheme, W.dtype)
