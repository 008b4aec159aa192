"""Choose scale and zero point of every group so that the error that matters is smallest.

The error of rounding a group w to q is (q - w) M (q - w)^T with M from the second moment H of the
layer's inputs: either only a diagonal (one weight per column) or the group's whole diagonal block
of H. Candidates are the min-max grid shrunk by a few ratios, with the zero point moved by one
step either way, then closed-form least-squares refits of the scale. The min-max grid is always a
candidate, so that the result is never worse than it in that measure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.scheme import QuantScheme, decode, encode, minmax_grid, stored

RATIOS = tuple(0.35 + 0.65 * (i + 0.5) / 14 for i in range(14))
REFITS = 3

Apply = Callable[[Tensor], Tensor]  # delta (..., G) -> delta M (..., G)


def by_column(weights: Tensor) -> Apply:
    """Error measure sum_j weights[..., j] * delta_j**2; weights broadcasts against (..., G)."""
    return lambda delta: delta * weights


def by_block(H: Tensor, width: int) -> Apply:
    """Error measure delta H_gg delta^T with the diagonal blocks of H (K, K), groups of `width`.

    Expects groups shaped (N, K/G, G).
    """
    K = H.shape[0]
    count = K // width
    blocks = H.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return lambda delta: torch.einsum("ngi,gij->ngj", delta, blocks)


def search_grid(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, apply: Apply
) -> tuple[Tensor, Tensor]:
    """Best scale and zero per group.

    Args:
        groups: float32 (..., G).
        scheme: the number format.
        dtype: the dtype in which scales are stored; candidates are judged after rounding to it.
        apply: the error measure, `by_column` or `by_block`.

    Returns:
        scale and zero, float32 (...), scale rounded to `dtype`.
    """
    scale, zero = minmax_grid(groups, scheme, dtype)
    error = _error(groups, scale, zero, scheme, apply)
    for trial_scale, trial_zero in _candidates(groups, scheme, dtype):
        scale, zero, error = _keep_better(
            groups, scheme, apply, (scale, zero, error), (trial_scale, trial_zero)
        )
    for _ in range(REFITS):
        refit = _least_squares_scale(groups, scale, zero, scheme, apply)
        trial = (stored(torch.where(refit > 0, refit, scale), dtype), zero)
        scale, zero, error = _keep_better(groups, scheme, apply, (scale, zero, error), trial)
    return scale, zero


def _candidates(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype):  # noqa: ANN202
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if scheme.symmetric:
        largest = torch.maximum(-low, high)
        middle = torch.full_like(low, scheme.middle)
        # Codes reach one step further down than up; let the grid end at either end of the range.
        reach = torch.where(-low >= high, scheme.middle, scheme.middle - 1)
        for ratio in RATIOS:
            yield stored(largest * (2 * ratio / scheme.qmax), dtype), middle
        for ratio in RATIOS[::-2]:
            yield stored(largest * ratio / reach, dtype), middle
        return
    for ratio in RATIOS:
        scale = stored((high - low) * (ratio / scheme.qmax), dtype)
        zero = (-low * ratio / scale).round_()
        for shift in (-1, 0, 1):
            yield scale, (zero + shift).clamp_(0, scheme.qmax)


def _error(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, apply: Apply
) -> Tensor:
    delta = decode(encode(groups, scale, zero, scheme.qmax), scale, zero).sub_(groups)
    return apply(delta).mul_(delta).sum(-1)


def _keep_better(
    groups: Tensor,
    scheme: QuantScheme,
    apply: Apply,
    best: tuple[Tensor, Tensor, Tensor],
    trial: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero, error = best
    trial_error = _error(groups, *trial, scheme, apply)
    better = trial_error < error
    return (
        torch.where(better, trial[0], scale),
        torch.where(better, trial[1], zero),
        torch.where(better, trial_error, error),
    )


def _least_squares_scale(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, apply: Apply
) -> Tensor:
    steps = encode(groups, scale, zero, scheme.qmax).sub_(zero.unsqueeze(-1))
    weighted = apply(steps)
    return (weighted * groups).sum(-1) / (weighted * steps).sum(-1)
