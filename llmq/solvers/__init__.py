"""Solvers: pure functions from a weight matrix and the second moment of its inputs to codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from llmq.scheme import QuantizedWeight, QuantScheme


class Solver(Protocol):
    """Turns a matrix into codes. Implementations are frozen dataclasses of options."""

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """Quantize one matrix.

        Args:
            W: (N, K) in the dtype in which scales are to be stored.
            H: float32 (K, K), the mean of x x^T over the inputs x of this matrix.
            scheme: the number format; its group size divides K.
        """
        ...


Rounding = Callable[[Tensor], QuantizedWeight]  # W (N, K) -> its codes


@runtime_checkable
class Preparing(Solver, Protocol):
    """A solver that can do once for many matrices what depends on H alone."""

    def over(self, H: Tensor, scheme: QuantScheme) -> Rounding:
        """`solve` for this H and scheme."""
        ...


def over(solver: Solver, H: Tensor, scheme: QuantScheme) -> Rounding:
    """A solver for one H and scheme, to be called with many matrices."""
    if isinstance(solver, Preparing):
        return solver.over(H, scheme)
    return lambda W: solver.solve(W, H, scheme)
