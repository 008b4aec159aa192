"""Round to nearest: every weight on its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmq.scheme import (
    QuantizedWeight,
    QuantScheme,
    empty,
    grouped,
    minmax_grid,
    round_to_grid,
)
from llmq.solvers.grid import AT_ONCE, by_block, search_grid


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
        """See `solvers.Solver.solve`. Of W and its codes, a few rows are worked on at once."""
        N, K = W.shape
        apply = by_block(H, scheme.group_width(K)) if self.search else None
        q = empty(scheme, (N, K), W.dtype, W.device)
        for rows in q.slices(AT_ONCE):
            part = W[rows].float()
            groups = grouped(part, scheme)  # (n, K/G, G)
            if apply is None:
                scale, zero = minmax_grid(groups, scheme, W.dtype)
            else:
                scale, zero = search_grid(groups, scheme, W.dtype, apply)
            own = round_to_grid(part, scale, zero, scheme, W.dtype)
            q.codes[rows], q.scale[rows], q.zero[rows] = own.codes, own.scale, own.zero
        return q
