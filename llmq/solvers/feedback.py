"""Solve rows in parts, so that later rows make good what earlier ones do to the outputs.

Rows of a matrix do not interact in tr(E H E^T), E = W - Q. They do in tr(G E H E^T), what the loss
feels of E if G is the second moment of its gradient by the outputs (see `curvature`). With
G = R R^T, R upper triangular, Babai's nearest plane algorithm goes over rows as `babai` goes over
columns: row i is rounded from where it would make good what the rows before it have lost,

    w_i + (sum over j < i of R_ji e_j) / R_ii

here a part of the rows at a time, which any solver rounds as if they were a matrix of their own.
After YAQA (Tseng et al. 2025, arXiv 2505.22988), where rounding has feedback on both sides.

That leaves the first rows as they were rounded before anything was known of the later ones. So the
parts are visited again: given all other rows, a part p is best at

    q_p + G_pp^-1 (G E)_p

towards which coordinate descent (`descent`) moves its codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.factor import factor
from llmq.scheme import QuantizedWeight, QuantScheme, joined
from llmq.solvers import Solver, over
from llmq.solvers.descent import descend
from llmq.solvers.gptq import alive


@dataclass(frozen=True)
class Feedback:
    """Feedback between the rows of a matrix.

    Args:
        parts: that a matrix is solved in, those rows first that the loss feels most.
        damp: added to the diagonal of G, as a share of its mean.
        tokens: of calibration text that G is measured on.
        rounds: how often all parts are visited again.
        sweeps: of coordinate descent at each of these visits.
    """

    parts: int = 8
    damp: float = 0.1
    tokens: int = 1 << 13
    rounds: int = 2
    sweeps: int = 2


def share_left(G: Tensor, how: Feedback) -> float:
    """What rounding errors cost with feedback between rows, over what they would cost without it.

    Errors d that rounding itself makes are taken to be independent and of one size in all rows.
    Without feedback they cost tr G. With it e = R^-T B^T d is lost, B the diagonal blocks of R that
    belong to parts: |B|^2 by G with its damping, of which the damping's |B R^-1|^2 do not count.
    What visiting parts again gains is not foreseen.

    Args:
        G: float32 (N, N).
    """
    G = alive(G)
    parts, R = _factored(G, how)
    exact, B, start = R.double(), torch.zeros_like(R, dtype=torch.float64), 0
    for part in parts:
        own = slice(start, start + len(part))
        B[own, own], start = exact[own, own], own.stop
    lost = torch.linalg.solve_triangular(exact, B, upper=True, left=False)
    damping = how.damp * G.diagonal().double().mean()
    return float((B.square().sum() - damping * lost.square().sum()) / G.diagonal().double().sum())


def _factored(G: Tensor, how: Feedback) -> tuple[Sequence[Tensor], Tensor]:
    """The rows of each part, those first that the loss feels most; and R, in this order."""
    order = G.diagonal().argsort(descending=True, stable=True)
    return order.split(-(-len(G) // how.parts)), factor(G, how.damp, order)


class _Rows:
    """A matrix that is solved part by part.

    Args:
        W: (N, K).
        G: float32 (N, N), or None: then all rows are in the first part.

    Attributes:
        parts: rows of each part.
        found: what is known of each part so far.
    """

    def __init__(self, W: Tensor, G: Tensor | None, how: Feedback):
        self.W = W
        self.G = None if len(W) == 1 or how.parts == 1 else G
        self.parts: Sequence[Tensor] = [torch.arange(len(W), device=W.device)]
        self.found: list[QuantizedWeight] = []
        if self.G is not None:
            self.G = alive(self.G).clone()
            self.parts, self.R = _factored(self.G, how)
            self.G.diagonal().add_(how.damp * self.G.diagonal().mean())
            self.lost = torch.zeros_like(W, dtype=torch.float32)

    def part(self, number: int) -> Tensor:
        """What is to be rounded first, (rows, K), when the parts before it are known."""
        W = self.W[self.parts[number]]
        if not number:
            return W
        start = number * len(self.parts[0])
        before, own = slice(0, start), slice(start, start + len(W))
        debt = self.R[before, own].T @ self.lost[torch.cat(list(self.parts[:number]))]
        return W + torch.linalg.solve_triangular(self.R[own, own].T, debt, upper=False).to(W.dtype)

    def again(self, number: int) -> Tensor:
        """Where the part would be best, (rows, K), when all others are as they are."""
        assert self.G is not None
        own = self.parts[number]
        G = self.G[own]
        pull = torch.linalg.solve(G[:, own].double(), (G @ self.lost).double())
        return (self.W[own] - self.lost[own] + pull.float()).to(self.W.dtype)

    def take(self, number: int, q: QuantizedWeight) -> None:
        """The part is rounded."""
        self.found[number : number + 1] = [q]
        if self.G is not None:
            own = self.parts[number]
            self.lost[own] = self.W[own].float() - q.dequantize(torch.float32)

    def value(self) -> QuantizedWeight:
        """All rows."""
        if len(self.parts) == 1:
            return self.found[0]
        return joined(self.found).rows(torch.cat(list(self.parts)).argsort())


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

    def visit(busy: list[_Rows], number: int, tall: QuantizedWeight) -> None:
        spans = _spans(len(rows.parts[number]) for rows in busy)
        for rows, span in zip(busy, spans, strict=True):
            rows.take(number, tall.rows(span))

    for number in range(how.parts):
        if busy := [rows for rows in every if number < len(rows.parts)]:
            visit(busy, number, rounding(torch.cat([rows.part(number) for rows in busy])))
    H = alive(H)
    for number in [*range(how.parts)] * how.rounds:
        busy = [rows for rows in every if rows.G is not None and number < len(rows.parts)]
        if busy:
            wanted = torch.cat([rows.again(number) for rows in busy])
            begun = joined([rows.found[number] for rows in busy])
            visit(busy, number, descend(wanted, H, begun, how.sweeps))
    return [rows.value() for rows in every]


def _spans(heights: Iterable[int]) -> Iterator[slice]:
    """Rows of matrices that lie one below the other."""
    start = 0
    for height in heights:
        yield slice(start, start + height)
        start += height
