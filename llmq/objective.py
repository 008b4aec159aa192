"""What a solver is asked for: a matrix W* and the second moment H of the inputs it will see.

Plainly W* = W. But behind quantized layers a linear reads x~ where the full-precision model has x,
and its output is added to a stream h~ that was h. The weights whose output is nearest to the
full-precision sum W x + h, in least squares over x~, are

    W* = W + share (W D + R) (H + lambda I)^-1
    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   R = mean (h - h~) x~^T

with share = 1; tr((W* - Q) H (W* - Q)^T) is then, up to a constant, the error of that sum.
Without R this is what GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (Zhang et al. 2025,
arXiv 2505.11695) solve column by column; the term in R matches the residual stream, as LoaQ does
(2025, arXiv 2509.06297). Shares below 1 guard against fitting the noise of few tokens: one is
chosen per linear from a small set that holds 0, by the error on batches that were held out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.adapters import RoutedLinear
from llmq.blocks import inputs_of
from llmq.calls import Call
from llmq.factor import divided, factor
from llmq.moments import SecondMoment, second_moments, weight_roots, with_prior
from llmq.residual import enters_a_sum, reads_and_sums
from llmq.solvers.gptq import alive

SHARES = (0.0, 0.25, 0.5, 0.75)  # all of it was worse than 3/4 where both were tried
HELD_OUT = 6  # every sixth batch only judges
MOST = 20.0  # times the mean |x|^2 of a batch is as much as a token can count
DAMP, MOST_DAMP = 0.01, 0.1  # of the mean of H's diagonal, at least and at most
FITTING, ROUNDING = 0.16, 3.0  # times columns per token: damping of targets and of solvers


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

    def targets(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per W (N, K) the matrix to round, of the same shape and dtype."""
        return dict(matrices)

    def moment(self) -> Tensor:
        """H as a solver should take it."""
        return self.H


class Drift:
    """Sums over tokens: of x~ x~^T, of (x - x~) x~^T and, at a sum, of (h - h~) x~^T.

    A token whose |x~|^2 is more than `MOST` times that of its batch's mean has the weight at which
    it is so much: the errors of such tokens say little about the model's, and would rule the sums.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu"):
        self.inputs = SecondMoment(K, device)
        self.D = torch.zeros(K, K, device=device)
        self.R: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, full_x: Tensor, missing: Tensor | None = None) -> None:
        """Take in quantized and full inputs (..., K) and h - h~ (..., N), if there is one."""
        roots = weight_roots(x.flatten(0, -2), MOST)
        rows = x.flatten(0, -2) * roots
        self.inputs.add(rows)
        self.D.addmm_((full_x.flatten(0, -2) * roots).sub_(rows).T, rows)
        if missing is not None:
            missing = missing.flatten(0, -2) * roots
            if self.R is None:
                self.R = rows.new_zeros(missing.shape[1], rows.shape[1])
            self.R.addmm_(missing.T, rows)

    def add_up(self) -> None:
        """Take in what all processes of this run have seen."""
        self.inputs.add_up()
        ranks.add_up(self.D)
        if self.R is not None:
            ranks.add_up(self.R)

    def finite(self) -> bool:
        sums = (
            (self.inputs.total, self.D) if self.R is None else (self.inputs.total, self.D, self.R)
        )
        return all(bool(total.isfinite().all()) for total in sums)

    def pull(self, W: Tensor) -> Tensor:
        """W D + R, float32 (N, K)."""
        pull = W.float() @ self.D
        return (pull if self.R is None else pull + self.R) / max(self.inputs.count, 1)

    def factor(self) -> Tensor:
        """Upper R, float32 (K, K), with R R^T = H + lambda I."""
        H = self.inputs.mean()
        return factor(alive(H), damping(FITTING, self.inputs.count, len(H)))


@dataclass(frozen=True)
class Matching(Problem):
    """Round W so that its output is nearest to what the full-precision model has in this place.

    Attributes:
        fit: the drift on the tokens that W* is fitted to while that is judged.
        judge: the drift on held-out tokens, which choose how far to go.
    """

    fit: Drift
    judge: Drift

    @classmethod
    def of(cls, fit: Drift, judge: Drift) -> Matching:
        """H is the mean over all tokens."""
        tokens = fit.inputs.count + judge.inputs.count
        H = fit.inputs.mean().mul_(fit.inputs.count / tokens)
        H += judge.inputs.mean().mul_(judge.inputs.count / tokens)
        return cls(H, tokens, fit, judge)

    def finite(self) -> bool:
        return self.fit.finite() and self.judge.finite()

    def moment(self) -> Tensor:
        """H with more on its diagonal if there were few tokens for its columns.

        What looks cheap in few tokens is less so in others, the more so in other kinds of text.
        Solvers add the usual share themselves.
        """
        extra = damping(ROUNDING, self.tokens, len(self.H)) - DAMP
        H = self.H.clone()
        H.diagonal().add_(extra * H.diagonal().mean())
        return H

    def targets(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On tokens that were held out it is judged how far to go; then all tokens tell where."""
        R = self.fit.factor()
        shares = {n: self.share(W, divided(self.fit.pull(W), R)) for n, W in matrices.items()}
        del R
        R = factor(alive(self.H), damping(FITTING, self.tokens, len(self.H)))
        return {
            n: (W.float() + shares[n] * divided(self.pull(W), R)).to(W.dtype) if shares[n] else W
            for n, W in matrices.items()
        }

    def pull(self, W: Tensor) -> Tensor:
        """Of all tokens."""
        part = self.fit.inputs.count / self.tokens
        return part * self.fit.pull(W) + (1 - part) * self.judge.pull(W)

    def share(self, W: Tensor, shift: Tensor) -> float:
        """The share of `shift` with the smallest error on held-out tokens."""
        square = float(((shift @ self.judge.inputs.mean()) * shift).sum())
        slope = float((shift * self.judge.pull(W)).sum())
        return min(SHARES, key=lambda share: share * (share * square - 2 * slope))


def is_held_out(batch: int, count: int) -> bool:
    """Whether a batch of calibration text, one of `count`, only judges: every sixth, and the last.

    The last one, so that there is one.
    """
    return batch % HELD_OUT == HELD_OUT - 1 or batch == count - 1


def damping(times: float, tokens: int, K: int) -> float:
    """What to add to H's diagonal, as a share of its mean, when `tokens` rows of length K made it.

    So many times K per token, but at least 1 % and at most 10 %.
    """
    return min(max(times * K / max(tokens, 1), DAMP), MOST_DAMP)


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
    K = work.get_parameter(f"{name}.weight").shape[-1]
    fit, judge = Drift(K, hidden[0].device), Drift(K, hidden[0].device)
    for b, ((x, h), (full_x, full_h)) in enumerate(zip(quantized, full, strict=True)):
        missing = None if h is None or full_h is None else full_h.float() - h.float()
        (judge if is_held_out(b, len(calls)) else fit).add(x, full_x, missing)
    ranks.meet()
    fit.add_up()
    judge.add_up()
    return [Matching.of(fit, judge)]


def _routed(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name), RoutedLinear)
