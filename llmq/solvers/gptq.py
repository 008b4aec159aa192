"""GPTQ: round column by column, let the columns not yet rounded absorb the error.

Frantar et al. 2022 (arXiv 2210.17323), carried out as Babai's nearest plane algorithm, which gives
the same codes without the inverse of H: see `babai`.

What differs from the textbook version:
- Grids minimise the rounding error weighted by R_jj^2, the weight that this very procedure gives
  to column j, and are chosen when their group is reached, from the updated weights.
- Columns are ordered by importance in whole groups and inside each group ("group-aware
  reordering"), so that groups stay contiguous and no index is needed at run time.
- Columns that never fired in calibration are rounded, not zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmq.factor import factor, inverted
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid
from llmq.solvers import Rounding
from llmq.solvers.babai import BLOCK, Pass
from llmq.solvers.grid import AT_ONCE, by_column, search_grid
from llmq.solvers.loops import round_columns
from llmq.solvers.trials import tried_grid

Order = Literal["group", "static", "none"]


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with searched grids and group-aware column order.

    Args:
        damp: added to the diagonal of H, as a share of its mean. Tripled, up to eight times,
            while H is not positive definite.
        order: "group" sorts groups by their largest diagonal entry of H and columns inside each
            group; "static" sorts all columns, with grids chosen beforehand from the original
            weights; "none" goes from left to right. None of them needs `g_idx` at run time.
        search: choose grids by weighted error; else the grid that just covers the group.
        trials: how many of the best grids of that search are tried, see `trials`; 0 takes the
            best one. Not in groups of more than 128 columns, nor with `order="static"`.
    """

    damp: float = 0.01
    order: Order = "group"
    search: bool = True
    trials: int = 0

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """See `solvers.Solver.solve`."""
        return self.over(H, scheme)(W)

    def over(self, H: Tensor, scheme: QuantScheme) -> Rounding:
        """See `solvers.Preparing`."""
        width = scheme.group_width(len(H))
        H = alive(H)
        order = column_order(H.diagonal(), width, self.order)
        R = factor(H, self.damp, order)
        trials = self.trials if self.search and width <= BLOCK else 0
        dynamic = self.order != "static"
        return lambda W: _Run(W, R, order, width, scheme, self.search, dynamic, trials).solve()


def alive(H: Tensor) -> Tensor:
    """H with the diagonal of columns that never fired set to the mean: plain rounding for them."""
    diagonal = H.diagonal()
    dead = diagonal <= 0
    if not bool(dead.any()):
        return H
    mean = diagonal.mean()
    H = H.clone()
    H.diagonal()[dead] = torch.where(mean > 0, mean, torch.ones_like(mean))
    return H


def column_order(importance: Tensor, width: int, order: Order) -> Tensor:
    """Permutation (K,) in which columns are rounded, from the diagonal of H (K,)."""
    if order == "none":
        return torch.arange(len(importance), device=importance.device)
    if order == "static":
        return importance.argsort(descending=True, stable=True)
    groups = importance.unflatten(0, (-1, width))
    inside = groups.argsort(dim=1, descending=True, stable=True)
    across = groups.amax(1).argsort(descending=True, stable=True)
    start = torch.arange(len(groups), device=importance.device).unsqueeze(1) * width
    return (inside + start)[across].flatten()


class _Run:
    """One pass over the columns: the grid of a group is chosen when the pass gets there."""

    def __init__(
        self,
        W: Tensor,
        R: Tensor,
        order: Tensor,
        width: int,
        scheme: QuantScheme,
        search: bool,
        dynamic: bool,
        trials: int,
    ):
        self.dtype, self.scheme, self.search, self.dynamic = W.dtype, scheme, search, dynamic
        self.trials = trials
        self.order, self.width = order, width
        self.babai = Pass(W, R, order)
        self.column_weights = R.diagonal().square()  # (K,)
        self.codes = torch.empty_like(self.babai.columns, dtype=torch.uint8)  # (K, N)
        count, N = len(order) // width, W.shape[0]
        self.scale = W.new_empty(count, N, dtype=torch.float32)
        self.zero = torch.empty_like(self.scale)
        self.group = order // width  # of each column, in the order of the pass
        if not dynamic:
            inverse = order.argsort()
            weights = self.column_weights[inverse].unflatten(0, (-1, width))
            scale, zero = self.grid(grouped(W.float(), scheme), weights)
            self.scale, self.zero = scale.T.contiguous(), zero.T.contiguous()

    def grid(self, groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.search:
            return search_grid(groups, self.scheme, self.dtype, by_column(weights))
        return minmax_grid(groups, self.scheme, self.dtype)

    def solve(self) -> QuantizedWeight:
        K = len(self.order)
        step = self.width if self.dynamic and self.width < BLOCK else BLOCK
        for start in range(0, K, step):
            stop = min(start + step, K)
            debt = self.babai.debt(start, stop)
            if self.dynamic and start % self.width == 0:
                self.choose_grid(start, debt)  # a group of more than BLOCK columns is a whole row
            self.codes[start:stop] = round_columns(
                self.babai.columns[start:stop],
                debt,
                self.babai.R[start:stop, start:stop],
                (self.scale, self.zero),
                self.group[start:stop],
                self.scheme.qmax,
            )
        inverse = self.order.argsort()
        return QuantizedWeight(
            self.scheme,
            self.codes[inverse].T.contiguous(),
            self.scale.T.to(self.dtype).contiguous(),
            self.zero.T.byte().contiguous(),
        )

    def choose_grid(self, start: int, debt: Tensor) -> None:
        """Grid of the group that begins at column `start`, from its weights as they are now."""
        own, g = slice(start, start + self.width), int(self.group[start])
        columns = self.babai.wanted(own.start, own.stop, debt)  # (G, N)
        if self.trials:
            U = inverted(self.babai.R[own, own])
            found = tried_grid(columns, U, self.scheme, self.dtype, self.trials)
        else:
            weights, step = self.column_weights[own], max(1, AT_ONCE // self.width)
            parts = [self.grid(p.T.contiguous(), weights) for p in columns.split(step, dim=1)]
            found = (torch.cat(values) for values in zip(*parts, strict=True))
        self.scale[g], self.zero[g] = found
