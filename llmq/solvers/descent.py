"""Polish a solution: move one code at a time, and every scale, as long as the error falls.

With R = (W - Q) H, changing one code of a row by d steps of size s changes the row's error
tr(D H D^T), D = W - Q, by -2 d s R_j + (d s)^2 H_jj: the best d is the nearest integer to
R_j / (s H_jj). Coordinate descent (QuantEase: Behdin et al. 2023, arXiv 2309.01885) starts where
GPTQ ends. It goes from group to group; inside a group every row moves the code that gains most,
and again until none gains (the rule of Gauss and Southwell): a few steps on all rows at once where
visiting columns in turn takes one per column, and lower in the end. Before the codes of a group are
visited, its scale is moved to the closed-form optimum Z R / (Z H Z), Z the centred codes, rounded
to the stored dtype. On the layers that were tried this interleaving ends where joint least squares
over all scales of a row, alternated with descent, ends; it needs no systems of equations and never
goes up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmq.moments import quadratic
from llmq.scheme import QuantizedWeight, QuantScheme, stored
from llmq.solvers import Rounding, Solver, over
from llmq.solvers.gptq import GPTQ, alive
from llmq.solvers.loops import moved_codes

PANEL = 128  # columns between two updates of everything else in a wider group
MOST = 4.0  # a scale changes at most by this factor in one step


@dataclass(frozen=True)
class Polished:
    """Another solver's answer, improved by coordinate descent; never worse than it.

    Args:
        start: the solver whose answer is improved.
        sweeps: passes over all groups at most; the last ones gain little.
    """

    start: Solver = GPTQ(trials=8)
    sweeps: int = 5

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """See `solvers.Solver.solve`."""
        return self.over(H, scheme)(W)

    def over(self, H: Tensor, scheme: QuantScheme) -> Rounding:
        """See `solvers.Preparing`."""
        start = over(self.start, H, scheme)
        H = alive(H)
        return lambda W: descend(W, H, start(W), self.sweeps)


class Moves(Protocol):
    """A solution that is being improved."""

    def sweep(self) -> None: ...
    def value(self) -> QuantizedWeight: ...


def descend(
    W: Tensor,
    H: Tensor,
    q: QuantizedWeight,
    sweeps: int,
    begin: Callable[[Tensor, Tensor, QuantizedWeight], Moves] | None = None,
) -> QuantizedWeight:
    """Lower tr(D H D^T), D = W - Q, row by row; a row that would end higher stays as it is.

    Args:
        W: (N, K).
        H: float32 (K, K), positive semidefinite, with a positive diagonal.
        q: where to start.
        sweeps: passes over all groups.
        begin: from W, H and q to what sweeps over them; the default moves codes and scales.
    """
    state = (begin or _Descent)(W, H, q)
    for _ in range(sweeps):
        state.sweep()
    polished = state.value()
    better = row_errors(W, H, polished) < row_errors(W, H, q)  # (N,)
    kept = {
        name: torch.where(better[:, None], new, getattr(q, name))
        for name, new in vars(polished).items()
        if isinstance(new, Tensor)
    }
    return replace(q, **kept)


def row_errors(W: Tensor, H: Tensor, q: QuantizedWeight) -> Tensor:
    """D H D^T per row, float64 (N,), of the weights as they are stored."""
    errors = []
    for rows in q.slices():
        delta = W[rows].double() - q.rows(rows).dequantize(torch.float64)
        errors.append(quadratic(delta, H))
    return torch.cat(errors)


class _Descent:
    """Weights and codes held transposed: one contiguous row per column of the matrix."""

    def __init__(self, W: Tensor, H: Tensor, q: QuantizedWeight):
        self.H, self.q = H, q
        self.W = W.T.float().contiguous()  # (K, N)
        self.codes = q.codes.T.float().contiguous()  # (K, N)
        self.scale = q.scale.T.float().contiguous()  # (K/G, N)
        self.zero = q.zero.T.float().contiguous()
        self.width = len(self.codes) // len(self.scale)

    def sweep(self) -> None:
        """One pass over all groups."""
        values = self.codes.unflatten(0, (-1, self.width)) - self.zero.unsqueeze(1)
        delta = self.W - values.mul_(self.scale.unsqueeze(1)).flatten(0, 1)  # (K, N)
        for g in range(len(self.scale)):
            own = slice(g * self.width, (g + 1) * self.width)
            residual = self.H[own] @ delta  # (G, N)
            self.move_scale(g, own, delta, residual)
            for start in range(own.start, own.stop, PANEL):
                stop = min(start + PANEL, own.stop)
                moves = self.move_codes(g, start, stop, residual[start - own.start :])
                delta[start:stop] += moves
                if stop < own.stop:
                    later = slice(stop, own.stop)
                    residual[stop - own.start :].addmm_(self.H[later, start:stop], moves)

    def move_scale(self, g: int, own: slice, delta: Tensor, residual: Tensor) -> None:
        """Give group `g` its best scale; `delta` and its `residual` (G, N) follow."""
        centred = self.codes[own] - self.zero[g]
        image = self.H[own, own] @ centred
        scale = self.scale[g]
        best = scale + (centred * residual).sum(0) / (centred * image).sum(0)
        near = (best >= scale / MOST) & (best <= scale * MOST)  # False where codes are all zero
        best = stored(torch.where(near, best, scale), self.q.scale.dtype, self.q.scheme.qmax)
        change = scale - best
        delta[own].addcmul_(centred, change)
        residual.addcmul_(image, change)
        self.scale[g] = best

    def move_codes(self, g: int, start: int, stop: int, residual: Tensor) -> Tensor:
        """Move codes of columns start..stop of group `g`; their changes in delta, (columns, N).

        `residual` holds (delta H) of these columns in its first rows; it stays as it is.
        """
        H, scale = self.H[start:stop, start:stop], self.scale[g]
        # How many steps every code is from its best place, as long as no other moves.
        away = residual[: stop - start] / (H.diagonal().unsqueeze(1) * scale)
        found = moved_codes(self.codes[start:stop], away, H, self.q.scheme.qmax)
        moves = (self.codes[start:stop] - found).mul_(scale)
        self.codes[start:stop] = found
        return moves

    def value(self) -> QuantizedWeight:
        return QuantizedWeight(
            self.q.scheme,
            self.codes.T.byte().contiguous(),
            self.scale.T.to(self.q.scale.dtype).contiguous(),
            self.q.zero,
        )
