"""Tune the codes and scales of one block together, until its output is nearest to what it was.

A code is the nearest integer to a latent number u, a scale is s exp(theta). Both move against the
sign of the gradient of

    mean over tokens |block~(x~) - block(x)|^2,

x~ and block~ quantized, x and block in full precision; the gradient passes straight through the
rounding. That is SignRound (Cheng et al. 2023, arXiv:2309.05516) with two differences: it starts at
the codes of a solver instead of at the rounded weights, and held-out batches choose among the
states that were looked at. The start is one of these: the block's output is never further off on
held-out text than before.

Memory: three float32 copies of one block and its activations for one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmq.calls import Call
from llmq.objective import is_held_out
from llmq.scheme import QuantizedWeight, stored

EDGE = 0.45  # how far from its code a latent number starts at most


@dataclass(frozen=True)
class BlockTuning:
    """How a block is tuned.

    Args:
        steps: each on one batch of calibration text.
        rate: how far a latent number moves in the first step, in codes; it falls linearly to 0.
        scale_rate: the same for scales, as a share of them.
        every: steps between two looks at held-out batches.
        patience: looks without progress after which it ends.
    """

    steps: int = 100
    rate: float = 0.02
    scale_rate: float = 0.002
    every: int = 20
    patience: int = 2


class _Matrix:
    """One quantized matrix with codes and scales that learn."""

    def __init__(self, W: Tensor, q: QuantizedWeight):
        self.q = q
        self.width = q.codes.shape[1] // q.scale.shape[1]
        scale, zero = (self._wide(t.float()) for t in (q.scale, q.zero))
        codes = q.codes.float()
        pull = (W.float() / scale + zero - codes).clamp_(-EDGE, EDGE)
        self.latent = codes.add(pull).requires_grad_()
        self.theta = torch.zeros_like(q.scale, dtype=torch.float32).requires_grad_()

    def _wide(self, groups: Tensor) -> Tensor:
        return groups.repeat_interleave(self.width, dim=1)

    def weight(self) -> Tensor:
        """float32 (N, K), differentiable."""
        limited = self.latent.clamp(0, self.q.scheme.qmax)
        codes = limited + (limited.round() - limited).detach()
        scale = self.q.scale.float() * self.theta.exp()
        scale = (
            scale
            + (stored(scale.detach(), self.q.scale.dtype, self.q.scheme.qmax) - scale).detach()
        )
        return (codes - self._wide(self.q.zero.float())) * self._wide(scale)

    def value(self) -> QuantizedWeight:
        codes = self.latent.detach().clamp(0, self.q.scheme.qmax).round().byte()
        scale = self.q.scale.float() * self.theta.detach().exp()
        scale = stored(scale, self.q.scale.dtype, self.q.scheme.qmax).to(self.q.scale.dtype)
        return QuantizedWeight(self.q.scheme, codes, scale, self.q.zero)

    def descend(self, how: BlockTuning, step: int) -> None:
        left = 1 - step / how.steps
        for tensor, rate in ((self.latent, how.rate), (self.theta, how.scale_rate)):
            if tensor.grad is not None:  # None for an expert that no token reached
                tensor.data.sub_(tensor.grad.sign(), alpha=rate * left)
                tensor.grad = None
        self.latent.data.clamp_(-EDGE, self.q.scheme.qmax + EDGE)


class _Trial:
    """A block whose matrices learn."""

    def __init__(
        self,
        block: nn.Module,
        solved: Mapping[str, Sequence[QuantizedWeight]],
        device: torch.device,
    ):
        self.block = copy.deepcopy(block).requires_grad_(False).to(device)
        for parameter in self.block.parameters():
            if parameter.is_floating_point() and not parameter.is_cuda:
                parameter.data = parameter.data.float()
        self.matrices: dict[str, list[_Matrix]] = {}
        for name, results in solved.items():
            weight = self.block.get_parameter(f"{name}.weight").data
            each = weight if weight.ndim == 3 else weight.unsqueeze(0)
            self.matrices[name] = [_Matrix(W, q) for W, q in zip(each, results, strict=True)]

    def every(self) -> Iterator[_Matrix]:
        return (matrix for matrices in self.matrices.values() for matrix in matrices)

    def miss(self, states: Tensor, call: Call, wanted: Tensor) -> Tensor:
        """Mean squared distance of the block's output from `wanted` (B, T, D)."""
        dtype = torch.float32 if states.device.type == "cpu" else states.dtype
        weights = {}
        for name, matrices in self.matrices.items():
            made = [matrix.weight().to(dtype) for matrix in matrices]
            stack = self.block.get_parameter(f"{name}.weight").ndim == 3
            weights[f"{name}.weight"] = torch.stack(made) if stack else made[0]
        call = call.to(states.device, dtype)
        arguments = (states.to(dtype), *call.args)
        output = functional_call(self.block, weights, arguments, call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        # Token by token first: sums of few numbers do not depend on the number of threads.
        return (output.float() - wanted.float()).square().mean(-1).mean(-1).mean()

    def values(self) -> dict[str, list[QuantizedWeight]]:
        return {name: [m.value() for m in matrices] for name, matrices in self.matrices.items()}


def tune_block(
    block: nn.Module,
    solved: Mapping[str, Sequence[QuantizedWeight]],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    wanted: Sequence[Tensor],
    how: BlockTuning,
) -> dict[str, list[QuantizedWeight]]:
    """What `solved` becomes.

    Args:
        block: in full precision, every matrix an `nn.Linear` or a `RoutedLinear`.
        solved: per matrix the solver's results, one per expert.
        hidden: per batch, the states (B, T, D) that enter the quantized block.
        calls: per batch, the rest of its arguments.
        wanted: per batch, what leaves the full-precision block.
        how: see there.

    Returns:
        the same names; what was given if nothing is better on held-out batches, or if there is
        only one batch.
    """
    start = {name: list(results) for name, results in solved.items()}
    count = len(calls)
    judging = [b for b in range(count) if is_held_out(b, count)]
    training = [b for b in range(count) if not is_held_out(b, count)]
    if not training or not solved:
        return start
    trial = _Trial(block, solved, hidden[0].device)

    @torch.no_grad()
    def look() -> float:
        return sum(float(trial.miss(hidden[b], calls[b], wanted[b])) for b in judging)

    best, found, stale = look(), start, 0
    for step in range(how.steps):
        turn, place = divmod(step, len(training))
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(turn))
        b = training[int(order[place])]
        with torch.enable_grad():
            trial.miss(hidden[b], calls[b], wanted[b]).backward()
        for matrix in trial.every():
            matrix.descend(how, step)
        if (step + 1) % how.every == 0 or step + 1 == how.steps:
            miss = look()
            best, found, stale = (
                (miss, trial.values(), 0) if miss < best else (best, found, stale + 1)
            )
            if stale == how.patience:
                break
    return found
