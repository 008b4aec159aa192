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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.adapters import RoutedLinear
from llmq.blocks import inputs_of
from llmq.calls import Call
from llmq.factor import divided, factor
from llmq.moments import SecondMoment, quadratic, second_moments, weight_roots, with_prior
from llmq.residual import enters_a_sum, reads_and_sums
from llmq.solvers.gptq import alive

SHARES = (0.0, 0.25, 0.5, 0.75)  # all of it was worse than 3/4 where both were tried
HELD_OUT = 6  # every sixth batch only judges
MOST = 20.0  # times the mean |x|^2 of a batch is as much as a token can count
DAMP, MOST_DAMP = 0.01, 0.1  # of the mean of H's diagonal, at least and at most
FITTING, ROUNDING = 0.16, 3.0  # times columns per token: damping of targets and of solvers


class Settled(NamedTuple):
    """What a solver gets.

    Attributes:
        H: float32 (K, K), the mean of x x^T over the inputs.
        extra: share of the mean of H's diagonal that it is to add to it, besides its own.
        targets: per matrix what is to be rounded, of its shape and dtype.
    """

    H: Tensor
    extra: float
    targets: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Round W so that its output changes least.

    Attributes:
        H: float32 (K, K), the mean of x x^T over the inputs.
        tokens: how many there were.
    """

    H: Tensor
    tokens: int

    @property
    def device(self) -> torch.device:
        return self.H.device

    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(self.H.diagonal().isfinite().all())

    def settled(self, matrices: Mapping[str, Tensor]) -> Settled:
        """For these W (N, K)."""
        return Settled(self.H, 0.0, dict(matrices))


class Drift:
    """Sums over tokens: of x~ x~^T, and of what is missing behind every matrix times x~^T.

    Behind W that is W (x - x~), and h - h~ at a sum. It is summed up itself, (N, K), where the
    matrices have no more rows than columns; else (x - x~) x~^T is, and multiplied by W at last.

    A token whose |x~|^2 is more than `MOST` times that of its batch's mean has the weight at which
    it is so much: the errors of such tokens say little about the model's, and would rule the sums.

    Args:
        matrices: W (N, K) by name, in full precision, that read one tensor.
    """

    def __init__(self, matrices: Mapping[str, Tensor]):
        first = next(iter(matrices.values()))
        K = first.shape[1]
        self.matrices = matrices
        self.inputs = SecondMoment(K, first.device)
        tall = sum(map(len, matrices.values())) > K
        self.D = torch.zeros(K, K, device=first.device) if tall else None
        self.missing: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, x: Tensor, full_x: Tensor, missing: Tensor | None = None) -> None:
        """Take in quantized and full inputs (..., K) and h - h~ (..., N), if there is one."""
        roots = weight_roots(x.flatten(0, -2), MOST)
        rows = x.flatten(0, -2) * roots
        self.inputs.add(rows)
        lag = (full_x.flatten(0, -2) * roots).sub_(rows)
        missing = None if missing is None else missing.flatten(0, -2) * roots
        if self.D is not None:
            self.D.addmm_(lag.T, rows)
        for name, W in self.matrices.items():
            behind = lag @ W.float().T if self.D is None else missing
            if behind is None:
                continue
            if self.D is None and missing is not None:
                behind += missing
            if name not in self.missing:
                self.missing[name] = torch.zeros_like(W, dtype=torch.float32)
            self.missing[name].addmm_(behind.T, rows)

    def add_up(self) -> None:
        """Take in what all processes of this run have seen."""
        self.inputs.add_up()
        for total in self._sums():
            ranks.add_up(total)

    def _sums(self) -> list[Tensor]:
        own = list(self.missing.values())
        return own if self.D is None else [self.D, *own]

    def finite(self) -> bool:
        return all(bool(total.isfinite().all()) for total in (self.inputs.total, *self._sums()))

    def pull(self, name: str, W: Tensor) -> Tensor:
        """Mean over tokens of what is missing behind W times x~^T, float32 (N, K)."""
        own = self.missing.get(name)
        if self.D is not None:
            pull = W.float() @ self.D
            return (pull if own is None else pull.add_(own)).div_(max(self.inputs.count, 1))
        assert own is not None
        return own / max(self.inputs.count, 1)


@dataclass(frozen=True)
class Matching:
    """Round W so that its output is nearest to what the full-precision model has in this place.

    Attributes:
        fit: the drift on the tokens that W* is fitted to while that is judged.
        judge: the drift on held-out tokens, which choose how far to go.
    """

    fit: Drift
    judge: Drift

    @property
    def tokens(self) -> int:
        return self.fit.inputs.count + self.judge.inputs.count

    @property
    def device(self) -> torch.device:
        return self.fit.inputs.total.device

    def finite(self) -> bool:
        return self.fit.finite() and self.judge.finite()

    def settled(self, matrices: Mapping[str, Tensor]) -> Settled:
        """For these W (N, K), which are among those of the drifts; the sums are used up.

        On tokens that were held out it is judged how far to go; then all tokens tell where. Solvers
        get more on the diagonal of H if there were few tokens for its columns: what looks cheap in
        few tokens is less so in others, the more so in other kinds of text.
        """
        fit, judge, tokens = self.fit, self.judge, self.tokens
        part = fit.inputs.count / tokens
        H, held_out = fit.inputs.finish(), judge.inputs.finish()
        K = len(H)
        R = factor(alive(H), damping(FITTING, fit.inputs.count, K))
        shares = {
            name: best_share(divided(fit.pull(name, W), R), held_out, judge.pull(name, W))
            for name, W in matrices.items()
        }
        del R
        H.mul_(part).add_(held_out, alpha=1 - part)
        del held_out
        R = factor(alive(H), damping(FITTING, tokens, K))
        targets = {}
        for name, W in matrices.items():
            targets[name] = W
            if shares[name]:
                pull = fit.pull(name, W).mul_(part).add_(judge.pull(name, W), alpha=1 - part)
                targets[name] = divided(pull, R).mul_(shares[name]).add_(W).to(W.dtype)
        return Settled(H, damping(ROUNDING, tokens, K) - DAMP, targets)


def best_share(shift: Tensor, H: Tensor, pull: Tensor) -> float:
    """The share of `shift` (N, K) with the smallest error on tokens with this H and `pull`."""
    square = float(quadratic(shift, H).sum())
    slope = float((shift * pull).sum())
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
    names: Sequence[str],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    twin: Twin | None = None,
) -> list[Problem] | list[Matching]:
    """What linears that read the same tensor are to be solved for.

    Args:
        work: the block as it is quantized so far.
        names: of them, or of a stack of experts.
        hidden: per batch, the hidden states (B, T, D) that enter `work`.
        calls: per batch, the rest of the block's arguments.
        twin: the full-precision block, to match its outputs.

    Returns:
        one problem, or one per expert. Experts have no twin, since the two streams may route a
        token differently; neither has a linear with a single batch, which leaves none to hold out.
    """
    name = names[0]
    if twin is None or _routed(work, name) or len(calls) == 1:
        moments = second_moments(inputs_of(work, name, hidden, calls))
        moments = with_prior(moments) if len(moments) > 1 else moments
        return [Problem(*moment) for moment in moments]
    sums = name in twin.sums
    quantized = reads_and_sums(work, name, hidden, calls, sums)
    full = reads_and_sums(twin.block, name, twin.hidden, calls, sums)
    matrices = {n: work.get_parameter(f"{n}.weight").data for n in names}
    fit, judge = Drift(matrices), Drift(matrices)
    for b, ((x, h), (full_x, full_h)) in enumerate(zip(quantized, full, strict=True)):
        missing = None if h is None or full_h is None else full_h.float() - h.float()
        (judge if is_held_out(b, len(calls)) else fit).add(x, full_x, missing)
    ranks.meet()
    fit.add_up()
    judge.add_up()
    return [Matching(fit, judge)]


def _routed(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name), RoutedLinear)
