"""What calibration keeps of a layer's inputs: their second moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llmq import ranks

PANELS = 4  # H is symmetric: computing its lower block triangle in 4 panels saves 3/8 of the work


class SecondMoment:
    """Running mean of x x^T over rows x, in float32 whatever their dtype.

    Args:
        K: length of a row.
        device: where the rows are.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(K, K, device=device)  # blocks above the diagonal stay zero
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in all rows of x (..., K); there may be none."""
        rows = x.reshape(-1, x.shape[-1]).float()
        K = rows.shape[1]
        step = -(-K // PANELS)
        for start in range(0, K, step):
            stop = min(start + step, K)
            self.total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        self.count += len(rows)

    def add_up(self) -> None:
        """Take in what all processes of this run have seen."""
        ranks.add_up(self.total)
        self.count = ranks.add_up_number(self.count, self.total.device)

    def mean(self) -> Tensor:
        """H (K, K), exactly symmetric; all zeros if no row was seen."""
        return (self.total.tril() + self.total.tril(-1).T) / max(self.count, 1)


def second_moments(inputs: Iterable[Tensor | Sequence[Tensor]]) -> list[tuple[Tensor, int]]:
    """Mean of x x^T and number of rows, of a tensor or of one tensor per expert.

    Args:
        inputs: per batch a tensor (..., K), or a sequence of E tensors (t_e, K).

    Returns:
        one (H, count), or E of them, over all processes of the run.
    """
    sums: list[SecondMoment] = []
    for batch in inputs:
        tensors = [batch] if isinstance(batch, Tensor) else batch
        if not sums:
            sums = [SecondMoment(x.shape[-1], x.device) for x in tensors]
        for moment, x in zip(sums, tensors, strict=True):
            moment.add(x)
    for moment in sums:
        moment.add_up()
    return [(moment.mean(), moment.count) for moment in sums]


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


def cholesky(H: Tensor, damp: float) -> Tensor:
    """Lower factor L, float64 (K, K), with L L^T = H + damp * mean(diag H) I.

    Damping is tripled, up to eight times, while that is not positive definite.

    Raises:
        ValueError: it is not even then (with damp=0.01 that is 65 times the mean: H is not a
            second moment).
    """
    damped = H.double()
    mean = damped.diagonal().mean()
    added = 0.0
    for _ in range(9):
        damped = damped.clone()
        damped.diagonal().add_((damp - added) * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return L
        added, damp = damp, damp * 3
    raise ValueError(
        f"second moment ({len(H)} columns) is not positive definite, even with {added:g} of its "
        "mean diagonal added."
    )
