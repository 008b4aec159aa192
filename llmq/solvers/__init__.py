"""Solvers: pure functions from a weight matrix and the second moment of its inputs to codes."""

from __future__ import annotations

from typing import Protocol

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
