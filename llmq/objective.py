"""What a solver is asked for: a matrix W* and the second moment H of the inputs it will see.

Plainly W* = W. But behind quantized layers a linear reads x~ where the full-precision model has x,
and its output is added to a stream h~ that was h. The weights whose output is nearest to the
full-precision sum W x + h, in least squares over x~, are

    W* = W + (alpha W D + rho R) (H + lambda I)^-1
    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   R = mean (h - h~) x~^T

with alpha = rho = 1; tr((W* - Q) H (W* - Q)^T) is then, up to a constant, the error of that sum.
With rho = 0 this is what GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (Zhang et al. 2025,
arXiv 2505.11695) solve column by column; the term in R matches the residual stream, as LoaQ does
(2025, arXiv 2509.06297). Shares below 1 guard against fitting the noise of few tokens: they are
chosen per linear from a small set that holds 0, by the error on batches that were held out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from llmq.adapters import RoutedLinear
from llmq.blocks import Call, inputs_of
from llmq.moments import cholesky, second_moments, with_prior
from llmq.residual import enters_a_sum, reads_and_sums
from llmq.solvers.gptq import alive

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
HELD_OUT = 6  # every sixth batch only judges
DAMP = 0.01  # of the mean of H's diagonal


@dataclass(frozen=True)
class Problem:
    """Round W so that its output changes least.

    Attributes:
        H: float32 (K, K), the mean of x x^T over the inputs.
        tokens: how many there were.
    """

    H: Tensor
    tokens: int

    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(self.H.diagonal().isfinite().all())

    def target(self, W: Tensor) -> Tensor:
        """The matrix (N, K) to round, in the dtype of W (N, K)."""
        return W

    def moment(self) -> Tensor:
        """H as a solver should take it."""
        return self.H


class Drift:
    """Sums over tokens of x~ x~^T, of (x - x~) x~^T and, at a sum, of (h - h~) x~^T."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: list[Tensor] = []  # (K, K), (K, K), (N, K)

    @torch.no_grad()
    def add(self, x: Tensor, full_x: Tensor, missing: Tensor | None) -> None:
        """Take in quantized and full inputs (..., K) and h - h~ (..., N), if there is one."""
        rows = x.flatten(0, -2).float()
        left = [rows, full_x.flatten(0, -2).float() - rows]
        if missing is not None:
            left.append(missing.flatten(0, -2))
        if not self._sums:
            self._sums = [rows.new_zeros(part.shape[1], rows.shape[1]) for part in left]
        for total, part in zip(self._sums, left, strict=True):
            total.addmm_(part.T, rows)
        self.tokens += len(rows)

    def __add__(self, other: Drift) -> Drift:
        both = Drift()
        both.tokens = self.tokens + other.tokens
        both._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        return both

    @cached_property
    def means(self) -> list[Tensor]:
        """H (K, K), exactly symmetric, D (K, K) and, at a sum, R (N, K)."""
        H, *rest = (total / self.tokens for total in self._sums)
        return [(H + H.T) / 2, *rest]

    @property
    def H(self) -> Tensor:
        return self.means[0]

    def pulls(self, W: Tensor) -> list[Tensor]:
        """W D and, if there is a sum, R: float32 (N, K)."""
        _, D, *R = self.means
        return [W.float() @ D, *R]

    def shifts(self, W: Tensor) -> list[Tensor]:
        """`pulls` times (H + lambda I)^-1: float32 (N, K), what alpha and rho scale."""
        return [
            torch.cholesky_solve(pull.T.double(), self._factor).T.float() for pull in self.pulls(W)
        ]

    @cached_property
    def _factor(self) -> Tensor:
        return cholesky(alive(self.H), damping(self.tokens, len(self.H)))


@dataclass(frozen=True)
class Matching(Problem):
    """Round W so that its output is nearest to what the full-precision model has in this place.

    Attributes:
        fit, judge: the drift on the tokens that fit W*, and on those held out.
        every: the drift on both.
    """

    fit: Drift
    judge: Drift
    every: Drift

    def finite(self) -> bool:
        return all(bool(mean.isfinite().all()) for mean in self.every.means)

    def moment(self) -> Tensor:
        """H with more on its diagonal if there were few tokens for its columns.

        Solvers add the usual share themselves.
        """
        extra = damping(self.tokens, len(self.H)) - DAMP
        H = self.H.clone()
        H.diagonal().add_(extra * H.diagonal().mean())
        return H

    def target(self, W: Tensor) -> Tensor:
        shares = self.shares(W)
        if not any(shares):
            return W
        moved = W.float()
        for share, shift in zip(shares, self.every.shifts(W), strict=True):
            moved = moved + share * shift
        return moved.to(W.dtype)

    def shares(self, W: Tensor) -> tuple[float, ...]:
        """alpha, and rho if there is a sum, with the smallest error on held-out tokens."""
        shifts, pull = self.fit.shifts(W), torch.stack(self.judge.pulls(W)).sum(0)
        images = [shift @ self.judge.H for shift in shifts]
        quadratic = [[float((a * b).sum()) for b in shifts] for a in images]
        linear = [float((shift * pull).sum()) for shift in shifts]

        def error(shares: tuple[float, ...]) -> float:
            pairs = itertools.product(enumerate(shares), repeat=2)
            square = sum(s * t * quadratic[i][j] for (i, s), (j, t) in pairs)
            return square - 2 * sum(s * v for s, v in zip(shares, linear, strict=True))

        return min(itertools.product(SHARES, repeat=len(shifts)), key=error)


def damping(tokens: int, K: int) -> float:
    """What to add to H's diagonal, as a share of its mean, when `tokens` rows of length K made it.

    1 % from 16 K tokens on, up to 10 % below.
    """
    return min(max(DAMP * 16 * K / max(tokens, 1), DAMP), 10 * DAMP)


class Twin:
    """The full-precision block beside the one that is being quantized.

    Args:
        work: the block, before any of it is quantized.
        hidden: per batch, the full-precision hidden states (B, T, D) that enter it.
        groups: names of its linears, grouped by the tensor that they read.
        probe: a few tokens of input, to find the linears whose output enters a sum.
    """

    def __init__(
        self,
        work: nn.Module,
        hidden: Sequence[Tensor],
        groups: list[list[str]],
        probe: tuple[Tensor, Call],
    ):
        self.block = copy.deepcopy(work)
        self.hidden = hidden
        alone = [g[0] for g in groups if len(g) == 1 and not _routed(work, g[0])]
        self.sums = {name for name in alone if enters_a_sum(work, name, *probe)}


def posed(
    work: nn.Module,
    name: str,
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    twin: Twin | None = None,
) -> list[Problem]:
    """What the linear `name` and those that read the same tensor are to be solved for.

    Args:
        work: the block as it is quantized so far.
        name: of a linear, or of a stack of experts.
        hidden: per batch, the hidden states (B, T, D) that enter `work`.
        calls: per batch, the rest of the block's arguments.
        twin: the full-precision block, to match its outputs.

    Returns:
        one problem, or one per expert. Experts have no twin, since the two streams may route a
        token differently; neither has a linear with a single batch, which leaves none to hold out.
    """
    if twin is None or _routed(work, name) or len(calls) == 1:
        moments = second_moments(inputs_of(work, name, hidden, calls))
        moments = with_prior(moments) if len(moments) > 1 else moments
        return [Problem(*moment) for moment in moments]
    sums = name in twin.sums
    quantized = reads_and_sums(work, name, hidden, calls, sums)
    full = reads_and_sums(twin.block, name, twin.hidden, calls, sums)
    fit, judge = Drift(), Drift()
    for b, ((x, h), (full_x, full_h)) in enumerate(zip(quantized, full, strict=True)):
        last = b % HELD_OUT == HELD_OUT - 1 or b == len(calls) - 1
        missing = None if h is None or full_h is None else full_h.float() - h.float()
        (judge if last else fit).add(x, full_x, missing)
    every = fit + judge
    return [Matching(every.H, every.tokens, fit, judge, every)]


def _routed(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name), RoutedLinear)
