"""Triangular factors of second moments: stored in float32, computed in float64 panel by panel.

What is rounded when a finished panel is stored enters all later panels as it is stored, so that
R R^T differs from H by about as much as H does from what float32 could hold of it. Besides R only
panels are held in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PANEL = 256  # columns of R that are computed at once
ROWS = 512  # rows that are worked on at once


def factor(H: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular R, float32 (K, K), with R R^T = H + damp * mean(diag H) I.

    Damping is tripled, up to eight times, while that is not positive definite.

    Args:
        H: float32 (K, K), symmetric.
        damp: share of the mean diagonal to add.
        order: (K,) int64, take the rows and columns of H in this order.

    Raises:
        ValueError: it is not even then (with damp=0.01 that is 65 times the mean: H is not a
            second moment), or not finite.
    """
    mean = float(H.diagonal().double().mean())
    if not math.isfinite(mean):
        raise ValueError(f"second moment ({len(H)} columns) has a NaN or an infinite number.")
    R, added = torch.empty_like(H), 0.0
    for _ in range(9):
        if order is None:
            R.copy_(H)
        else:
            for rows, own in zip(R.split(ROWS), order.split(ROWS), strict=True):
                rows.copy_(H[own][:, order])
        if _factored(R, damp * mean):
            return R.triu_()
        added, damp = damp, damp * 3
    raise ValueError(
        f"second moment ({len(H)} columns) is not positive definite, even with {added:g} of its "
        "mean diagonal added."
    )


def _factored(R: Tensor, added: float) -> bool:
    """Put the factor in the place of R's upper triangle; False if it does not exist.

    R = [[A, B], [B^T, C]] has the factor [[A', B'], [0, C']] with C' C'^T = C, B' C'^T = B and
    A' A'^T = A - B' B'^T: the last columns come first.
    """
    for stop in range(len(R), 0, -PANEL):
        start = max(0, stop - PANEL)
        own, right = R[start:stop, start:stop], R[start:stop, stop:].double()
        corner = torch.addmm(own.double(), right, right.T, alpha=-1)
        corner.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if bool(info):
            return False
        corner = lower.flip(0, 1)
        own.copy_(corner)
        for rows in R[:start].split(ROWS):
            above = rows[:, start:stop].double()
            above.addmm_(rows[:, stop:].double(), right.T, alpha=-1)
            rows[:, start:stop] = _over(above, corner.T, upper=False)
    return True


def divided(B: Tensor, R: Tensor) -> Tensor:
    """B (R R^T)^-1, float32 (N, K), computed in float64.

    Args:
        B: (N, K).
        R: upper triangular (K, K), see `factor`.
    """
    X = B.double()
    for stop in range(len(R), 0, -PANEL):  # X R^T = B
        start = max(0, stop - PANEL)
        panel = R[start:stop].double()
        own = X[:, start:stop].addmm_(X[:, stop:], panel[:, stop:].T, alpha=-1)
        own.copy_(_over(own, panel[:, start:stop].T, upper=False))
    for start in range(0, len(R), PANEL):  # then with R
        stop = start + PANEL
        panel = R[:stop, start:stop].double()
        own = X[:, start:stop].addmm_(X[:, :start], panel[:start], alpha=-1)
        own.copy_(_over(own, panel[start:], upper=True))
    return X.float()


def inverted(R: Tensor) -> Tensor:
    """R^-1 of a small upper triangular R (G, G), computed in float64, in R's dtype."""
    eye = torch.eye(len(R), dtype=torch.float64, device=R.device)
    return torch.linalg.solve_triangular(R.double(), eye, upper=True).to(R.dtype)


def _over(B: Tensor, T: Tensor, upper: bool) -> Tensor:
    """X with X T = B for a triangular T."""
    return torch.linalg.solve_triangular(T, B, upper=upper, left=False)
