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

from llmq.scheme import QuantScheme, minmax_grid, stored

RATIOS = tuple(0.35 + 0.65 * (i + 0.5) / 14 for i in range(14))
REFITS = 3
AT_ONCE = 2**20  # weights times candidates evaluated together: what caches hold

Apply = Callable[[Tensor], Tensor]  # delta (..., G) -> delta M (..., G)


def by_column(weights: Tensor) -> Apply:
    """Error measure sum_j weights[..., j] * delta_j**2; weights broadcasts against (..., G)."""
    return lambda delta: delta * weights


def by_block(H: Tensor, width: int) -> Apply:
    """Error measure delta H_gg delta^T with the diagonal blocks of H (K, K), groups of `width`.

    Expects groups shaped (..., K/G, G).
    """
    count = len(H) // width
    blocks = H.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return lambda delta: torch.einsum("...gi,gij->...gj", delta, blocks)


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
    scales, zeros, errors = _ranked(groups, scheme, dtype, apply, 1)
    scale, zero, error = scales[0], zeros[0], errors[0]
    for _ in range(REFITS):
        trial = _refitted(groups, scale, zero, scheme, dtype, apply)
        trial_error = _error(groups, trial, zero, scheme, apply)
        better = trial_error < error
        scale = torch.where(better, trial, scale)
        error = torch.where(better, trial_error, error)
    return scale, zero


def shortlist(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, apply: Apply, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` best candidates of `search_grid`, then the same with their scales refitted.

    Args: see `search_grid`.

    Returns:
        scales and zeros, float32 (2 * count, ...), scales rounded to `dtype`.
    """
    scales, zeros, _ = _ranked(groups, scheme, dtype, apply, count)
    refitted = scales
    for _ in range(REFITS):
        refitted = _refitted(groups, refitted, zeros, scheme, dtype, apply)
    return torch.cat([scales, refitted]), torch.cat([zeros, zeros])


def _ranked(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, apply: Apply, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zeros and errors (count, ...) of the best candidates, best first."""
    scales, zeros = _candidates(groups, scheme, dtype)  # (C, ...)
    step = max(1, AT_ONCE // groups.numel())
    # In their place from the start: small results between large ones break up the C library's heap.
    errors = torch.empty_like(scales)
    for i in range(0, len(scales), step):
        part = slice(i, i + step)
        errors[part] = _error(groups, scales[part], zeros[part], scheme, apply)
    several = count > 1
    best = errors.argsort(dim=0, stable=True)[:count] if several else errors.argmin(0, keepdim=True)
    return scales.gather(0, best), zeros.gather(0, best), errors.gather(0, best)


def _candidates(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros (C, ...) to try; the first is the min-max grid."""
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    ratios = groups.new_tensor(RATIOS).view(-1, *[1] * low.ndim)
    covering, middle = minmax_grid(groups, scheme, dtype)
    if scheme.symmetric:
        # Codes reach one step further down than up; let the grid end at either end of the range.
        reach = torch.where(-low >= high, scheme.middle, scheme.middle - 1)
        largest = torch.maximum(-low, high)
        shrunk = stored(largest * ratios * (2 / scheme.qmax), dtype, scheme.qmax)
        one_sided = stored(largest * ratios[::2] / reach, dtype, scheme.qmax)
        scales = torch.cat([covering[None], shrunk, one_sided])
        return scales, middle.expand_as(scales)
    shrunk = stored((high - low) * ratios / scheme.qmax, dtype, scheme.qmax)
    zeros = (-low * ratios / shrunk).round_()
    shifted = [(zeros + shift).clamp_(0, scheme.qmax) for shift in (-1, 0, 1)]
    return torch.cat([covering[None], *[shrunk] * 3]), torch.cat([middle[None], *shifted])


def _error(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, apply: Apply
) -> Tensor:
    """Error (...) of every group on the grid `scale`, `zero` (...), or for C grids at once."""
    delta, _ = _steps(groups, scale, zero, scheme)
    return apply(delta).mul_(delta).sum(-1).mul_(scale.square())


def _steps(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """Rounding error in steps of the grid, and the centred codes, both (..., G)."""
    exact = groups / scale.unsqueeze(-1)
    lowest = -zero.unsqueeze(-1)
    codes = exact.round().clamp_(lowest, lowest + scheme.qmax)
    return exact.sub_(codes), codes


def _refitted(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype,
    apply: Apply,
) -> Tensor:
    """The least-squares scale (...) for the codes that `scale` and `zero` (...) give."""
    _, codes = _steps(groups, scale, zero, scheme)
    weighted = apply(codes)
    best = (weighted * groups).sum(-1) / (weighted * codes).sum(-1)
    return stored(torch.where(best > 0, best, scale), dtype, scheme.qmax)
