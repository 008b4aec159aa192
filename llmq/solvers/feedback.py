"""Solve rows in parts, so that later rows make good what earlier ones do to the outputs.

Rows of a matrix do not interact in tr(E H E^T), E = W - Q. They do in tr(G E H E^T), what the loss
feels of E if G is the second moment of its gradient by the outputs (see `curvature`). With
G = R R^T, R upper triangular, Babai's nearest plane algorithm goes over rows as `babai` goes over
columns: row i is rounded from where it would make good what the rows before it have lost,

    w_i + (sum over j < i of R_ji e_j) / R_ii

here a part of the rows at a time, which any solver rounds as if they were a matrix of their own.
After YAQA (Tseng et al. 2025, arXiv 2505.22988), where rounding has feedback on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.factor import factor
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers import Solver, over
from llmq.solvers.gptq import alive


@dataclass(frozen=True)
class Feedback:
    """Feedback between the rows of a matrix.

    Args:
        parts: that a matrix is solved in, those rows first that the loss feels most.
        damp: added to the diagonal of G, as a share of its mean.
        tokens: of calibration text that G is measured on.
    """

    parts: int = 4
    damp: float = 0.1
    tokens: int = 1 << 13


class _Rows:
    """A matrix that is solved part by part.

    Args:
        W: (N, K).
        G: float32 (N, N), or None: then all rows are in the first part.
    """

    def __init__(self, W: Tensor, G: Tensor | None, how: Feedback):
        self.W = W
        G = None if len(W) == 1 else G
        self.step = len(W) if G is None else -(-len(W) // how.parts)
        self.order = torch.arange(len(W), device=W.device)
        if G is not None:
            self.order = G.diagonal().argsort(descending=True, stable=True)
            self.R = factor(alive(G), how.damp, self.order)
            self.lost = torch.zeros_like(W, dtype=torch.float32)  # in the order of the parts
        self.found: list[QuantizedWeight] = []

    def part(self, number: int) -> Tensor:
        """What is to be rounded next, (rows, K); there may be no rows left."""
        own = slice(number * self.step, (number + 1) * self.step)
        W = self.W[self.order[own]]
        if not number or not len(W):
            return W
        before = slice(0, own.start)
        debt = self.R[before, own].T @ self.lost[before]
        return W + torch.linalg.solve_triangular(self.R[own, own].T, debt, upper=False).to(W.dtype)

    def take(self, number: int, q: QuantizedWeight) -> None:
        """The part is rounded."""
        own = slice(number * self.step, (number + 1) * self.step)
        self.found.append(q)
        if self.step < len(self.W):
            self.lost[own] = self.W[self.order[own]].float() - q.dequantize(torch.float32)

    def value(self) -> QuantizedWeight:
        """All rows."""
        if len(self.found) == 1:
            return self.found[0]
        back = self.order.argsort()
        names = [name for name, part in vars(self.found[0]).items() if isinstance(part, Tensor)]
        whole = {n: torch.cat([getattr(q, n) for q in self.found])[back] for n in names}
        return replace(self.found[0], **whole)


def solve_rows(
    solver: Solver,
    matrices: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    H: Tensor,
    scheme: QuantScheme,
    how: Feedback,
) -> list[QuantizedWeight]:
    """Solve matrices that read one tensor.

    Args:
        solver: rounds parts of them.
        matrices: (N, K) each.
        moments: G of each, float32 (N, N); None = its rows do not interact.
        H: float32 (K, K).
        scheme: their number format; integers in groups.
        how: see `Feedback`.
    """
    if how.parts == 1 or not any(G is not None for G in moments):
        tall, heights = solver.solve(torch.cat(list(matrices)), H, scheme), map(len, matrices)
        return [tall.rows(rows) for rows in _spans(heights)]
    rounding = over(solver, H, scheme)
    every = [_Rows(W, G, how) for W, G in zip(matrices, moments, strict=True)]
    for number in range(how.parts):
        parts = [rows.part(number) for rows in every]
        busy = [(rows, part) for rows, part in zip(every, parts, strict=True) if len(part)]
        if not busy:
            break
        tall = rounding(torch.cat([part for _, part in busy]))
        spans = _spans(len(part) for _, part in busy)
        for (rows, _), span in zip(busy, spans, strict=True):
            rows.take(number, tall.rows(span))
    return [rows.value() for rows in every]


def _spans(heights: Iterable[int]) -> Iterator[slice]:
    """Rows of matrices that lie one below the other."""
    start = 0
    for height in heights:
        yield slice(start, start + height)
        start += height
