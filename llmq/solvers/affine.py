"""Grids with a real offset, w = scale * code - offset: what the groups of super-blocks ask for.

The error of a group is sum_j weights[j] (w_j - q_j)^2. Candidates are the range of the group
shrunk from either end, then least-squares refits of scale and offset for the codes they give.
A scale of 0 makes every weight -offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from llmq.solvers.grid import AT_ONCE, REFITS

ENDS = (0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 1.0)  # shares of a range


def fitted(x: Tensor, weights: Tensor, qmax: int, middle: int | None) -> tuple[Tensor, Tensor]:
    """The best scale and offset of every group, rounding each weight on its own.

    Args:
        x: float32 (R, G).
        weights: of squared errors, float32 (G,) or (R, G).
        qmax: largest code.
        middle: the code of 0, and scales of either sign; None = any offset that is not negative,
            and no negative scale.

    Returns:
        scale and offset, float32 (R,).
    """
    weights = weights.expand_as(x)
    step = max(1, AT_ONCE // (len(ENDS) ** 2 * x.shape[1]))
    both = zip(x.split(step), weights.split(step), strict=True)
    scales, offsets = zip(*(_fitted(*part, qmax, middle) for part in both), strict=True)
    return torch.cat(scales), torch.cat(offsets)


def _fitted(x: Tensor, weights: Tensor, qmax: int, middle: int | None) -> tuple[Tensor, Tensor]:
    scale, offset = _candidates(x, qmax, middle)  # (C, R)
    best = errors(x, weights, scale, offset, qmax).argmin(0, keepdim=True)
    scale, offset = scale.gather(0, best)[0], offset.gather(0, best)[0]
    error = errors(x, weights, scale, offset, qmax)
    for _ in range(REFITS):
        trial = refitted(x, weights, encoded(x, scale, offset, qmax), scale, middle)
        found = errors(x, weights, *trial, qmax)
        better = found < error
        scale, offset = torch.where(better, trial[0], scale), torch.where(better, trial[1], offset)
        error = torch.where(better, found, error)
    return scale, offset


def _candidates(x: Tensor, qmax: int, middle: int | None) -> tuple[Tensor, Tensor]:
    """Scales and offsets (C, R) to try."""
    ends = x.new_tensor(ENDS).unsqueeze(1)
    if middle is not None:
        far = x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1)
        reach = far / -middle, far / (qmax - middle)  # codes reach further down than up
        scale = torch.cat([ends * reach[0], ends * reach[1]])
        return scale, scale * middle
    low, high = x.amin(1).clamp(max=0), x.amax(1)
    pairs = list(product(ends, ends))
    offset = torch.stack([-low * a for a, _ in pairs])
    scale = torch.stack([high * b - low * a for a, b in pairs]).clamp_(min=0) / qmax
    return scale, offset


def encoded(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """Nearest codes, float32 (..., G), of x (..., G) on the grids `scale`, `offset` (...)."""
    return (x + offset.unsqueeze(-1)).mul_(reciprocal(scale).unsqueeze(-1)).round_().clamp_(0, qmax)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def errors(x: Tensor, weights: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """Error (...) of x (R, G) on the grids `scale`, `offset` (..., R)."""
    codes = encoded(x, scale, offset, qmax)
    delta = codes.mul_(scale.unsqueeze(-1)).sub_(offset.unsqueeze(-1)).sub_(x)
    return delta.square_().mul_(weights).sum(-1)


def refitted(
    x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, middle: int | None
) -> tuple[Tensor, Tensor]:
    """Least-squares scale and offset (R,) for x, weights and codes (R, G); else the old scale."""
    if middle is not None:
        codes = codes - middle
        square = (weights * codes * codes).sum(-1)
        best = torch.where(square > 0, (weights * codes * x).sum(-1) / square, scale)
        return best, best * middle
    total = weights.sum(-1).clamp(min=torch.finfo(x.dtype).tiny)
    mean, centre = (weights * codes).sum(-1) / total, (weights * x).sum(-1) / total
    apart = codes - mean.unsqueeze(-1)
    square = (weights * apart * apart).sum(-1)
    best = torch.where(square > 0, (weights * apart * x).sum(-1) / square, scale).clamp_(min=0)
    offset = best * mean - centre
    plain = (weights * codes * x).sum(-1) / (weights * codes * codes).sum(-1)  # without offset
    below = (offset < 0) & (plain > 0)
    return torch.where(below, plain, best), offset.clamp_(min=0)


def rounded_pass(
    columns: Tensor, pending: Tensor, R: Tensor, scale: Tensor, offset: Tensor, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns (G, N) one after the other, each absorbing what the earlier ones lost.

    With H = R R^T the error of a row is |D R|^2, D = W - Q, of which R_jj (w_j - q_j) +
    sum_{i<j} D_i R_ij belongs to column j.

    Args:
        columns: W, float32.
        pending: sum_{i<j} D_i R_ij over the columns before these, (G, N).
        R: upper triangular (G, G), these columns' part of it.
        scale, offset: (N,).
        qmax: largest code.

    Returns:
        codes and D, float32 (G, N), and the error of these columns (N,).
    """
    pending, codes, lost = pending.clone(), torch.empty_like(columns), torch.empty_like(columns)
    total, steps = torch.zeros_like(scale), reciprocal(scale)
    for i, pivot in enumerate(R.diagonal().tolist()):
        wanted = pending[i].div(pivot).add_(columns[i])
        code = torch.add(wanted, offset).mul_(steps).round_().clamp_(0, qmax)
        value = code * scale - offset
        codes[i] = code
        torch.sub(columns[i], value, out=lost[i])
        total.add_(wanted.sub_(value).mul_(pivot).square_())
        pending[i + 1 :].addr_(R[i, i + 1 :], lost[i])
    return codes, lost, total


def in_parts(count: int, each: int) -> Iterator[slice]:
    """0..count in slices of so many that `each` numbers for one of them stay in caches."""
    step = max(1, AT_ONCE // each)
    for start in range(0, count, step):
        yield slice(start, start + step)
