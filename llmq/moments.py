"""What calibration keeps of a layer's inputs: their second moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PANELS = 4  # H is symmetric: computing its lower block triangle in 4 panels saves 3/8 of the work


@torch.no_grad()
def second_moment(inputs: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Mean of x x^T over all rows x of `inputs`.

    Args:
        inputs: tensors (..., K); products are accumulated in float32 whatever their dtype.

    Returns:
        H, float32 (K, K), exactly symmetric; and the number of rows. All zeros if there are none.
    """
    total: Tensor | None = None
    count = 0
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1]).float()
        K = rows.shape[1]
        if total is None:
            total = torch.zeros(K, K, device=x.device)
        step = -(-K // PANELS)
        for start in range(0, K, step):
            stop = min(start + step, K)
            total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        count += len(rows)
    if total is None:
        raise ValueError("second_moment needs at least one tensor, possibly with no rows")
    H = total.tril() + total.tril(-1).T
    return H / max(count, 1), count


def with_prior(moments: Sequence[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    """Second moments of one layer's experts, each mixed with all of them pooled.

    H_e <- (n_e H_e + K H_pooled) / (n_e + K): an expert that saw many more than K tokens keeps
    its own moment, a starved one is solved with what its siblings saw. Counts stay.
    """
    K = len(moments[0][0])
    total = sum(n for _, n in moments)
    pooled = torch.zeros_like(moments[0][0])
    for H, n in moments:
        pooled += H * (n / max(total, 1))
    return [((H * n + pooled * K) / (n + K), n) for H, n in moments]
