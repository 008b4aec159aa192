"""AWQ: scale the channels that matter up before rounding, and their producer down.

Lin et al. 2023 (arXiv 2306.00978). For a proven smoothing pair (see `awq_pairs`) the factors are
s = rms(x)^alpha, normalised to geometric range one. alpha runs over a grid; each candidate is
judged by the exact expected squared error of the readers' outputs, tr(D H D^T) with
D = Q(W s) / s - W, over all calibration tokens. The winner is then kept only if it lowers the
error of the block's own output on real sequences. AWQ is a transform: any solver may follow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmq.blocks import hooks, run_block
from llmq.calls import Call
from llmq.moments import SecondMoment
from llmq.scheme import QuantScheme
from llmq.solvers.awq_pairs import Pair, fold, proven_pairs
from llmq.solvers.rtn import RTN


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling.

    Args:
        steps: alpha takes the values 0, 1/steps, ..., 1.
    """

    steps: int = 10

    def smooth(
        self,
        block: nn.Module,
        work: nn.Module,
        schemes: dict[str, QuantScheme],
        hidden: Sequence[Tensor],
        calls: Sequence[Call],
        probe: tuple[Tensor, Call],
    ) -> list[Pair]:
        """Fold the best factors into `block`, in place; returns the pairs that were used.

        Args:
            block: the block in its stored dtype, as `adapters.as_linears` makes it.
            work: the same block on the device and in the dtype in which calibration runs.
            schemes: number format per linear that will be quantized.
            hidden: per batch, the block's input (B, T, D).
            calls: per batch, the rest of the block's arguments.
            probe: a few tokens of input, to prove the pairs with.
        """
        pairs = [
            pair
            for pair in proven_pairs(work, *probe)
            if not schemes.keys().isdisjoint(pair.readers)
        ]
        moments = _moments(work, pairs, hidden, calls)
        target = run_block(work, hidden[-1], calls[-1])
        used = []
        for pair, H in zip(pairs, moments, strict=True):
            factors = self.search(block, pair, H, schemes)
            if factors is None:
                continue
            plain, scaled = (
                _output_error(work, pair, schemes, s, hidden[-1], calls[-1], target)
                for s in (None, factors)
            )
            if scaled < plain:
                fold(block, pair, factors)
                fold(work, pair, factors)
                used.append(pair)
        return used

    def search(
        self, block: nn.Module, pair: Pair, H: Tensor, schemes: dict[str, QuantScheme]
    ) -> Tensor | None:
        """Factors (K,) with the smallest expected output error; None if no scaling is best."""
        rms = pair.tie(H.diagonal()).clamp(min=H.diagonal().mean() * 1e-8).sqrt()
        best, best_error = None, float("inf")
        for step in range(self.steps + 1):
            factors = rms ** (step / self.steps)
            factors = factors / (factors.max() * factors.min()).sqrt()
            error = sum(
                _expected_error(block.get_parameter(f"{name}.weight"), factors, H, schemes[name])
                for name in pair.readers
                if name in schemes
            )
            if error < best_error:
                best, best_error = (factors if step else None), error
        return best


def _expected_error(weight: Tensor, factors: Tensor, H: Tensor, scheme: QuantScheme) -> float:
    total = 0.0
    for W in weight if weight.ndim == 3 else [weight]:
        W = W.to(H.device)
        scaled = (W.float() * factors).to(W.dtype)
        rounded = RTN().solve(scaled, H, scheme).dequantize(torch.float32)
        delta = rounded / factors - W.float()
        total += float(((delta @ H) * delta).sum())
    return total


@torch.no_grad()
def _output_error(
    block: nn.Module,
    pair: Pair,
    schemes: dict[str, QuantScheme],
    factors: Tensor | None,
    hidden: Tensor,
    call: Call,
    target: Tensor,
) -> float:
    """Squared error of the block's output with the pair's readers scaled and rounded to nearest."""
    trial = copy.deepcopy(block)
    if factors is not None:
        fold(trial, pair, factors)
    for name in pair.readers:
        if name in schemes:
            weight = trial.get_parameter(f"{name}.weight")
            for W in weight if weight.ndim == 3 else [weight]:
                W.data.copy_(RTN().solve(W.data, W.data, schemes[name]).dequantize())
    return float((run_block(trial, hidden, call).float() - target.float()).square().sum())


def _moments(
    block: nn.Module, pairs: Sequence[Pair], hidden: Sequence[Tensor], calls: Sequence[Call]
) -> list[Tensor]:
    """Per pair, the second moment (K, K) of the tensor that its readers read."""
    sums: dict[str, SecondMoment] = {}

    def add(_: nn.Module, args: tuple[Tensor | list[Tensor], ...], name: str) -> None:
        for x in [args[0]] if isinstance(args[0], Tensor) else args[0]:
            sums.setdefault(name, SecondMoment(x.shape[-1], x.device)).add(x)

    names = [pair.readers[0] for pair in pairs]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(add, name=name))
        for name in names
    ]
    with hooks(*handles):
        for states, call in zip(hidden, calls, strict=True):
            run_block(block, states, call)
    finished = {name: moment.finish() for name, moment in sums.items()}
    return [finished[name] for name in names]
