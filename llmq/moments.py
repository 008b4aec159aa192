"""What calibration keeps of a layer's inputs: their second moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq import ranks

PANELS = 4  # H is symmetric: computing its lower block triangle in 4 panels saves 3/8 of the work
ROWS = 1024  # of H that are converted at once, at most


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
        return _mirrored(self.total / max(self.count, 1))

    def finish(self) -> Tensor:
        """The same as `mean`, in the place of `total`, which is no more."""
        total = self.total
        del self.total
        return _mirrored(total.div_(max(self.count, 1)))


def _mirrored(H: Tensor) -> Tensor:
    """H (K, K), its upper triangle replaced by its lower one, in place."""
    K = len(H)
    step = -(-K // PANELS)
    for start in range(0, K, step):
        stop = min(start + step, K)
        own = H[start:stop, start:stop]
        own.copy_(own.tril() + own.tril(-1).T)
        H[:start, start:stop] = H[start:stop, :start].T
    return H


@contextmanager
def damped(H: Tensor, share: float) -> Iterator[None]:
    """H (K, K) with a share of its mean diagonal added to it, for the length of a `with`."""
    diagonal = H.diagonal().clone()
    H.diagonal().add_(share * diagonal.mean())
    try:
        yield
    finally:
        H.diagonal().copy_(diagonal)


def second_moments(inputs: Iterable[Tensor | Sequence[Tensor]]) -> list[tuple[Tensor, int]]:
    """Mean of x x^T and number of rows, of a tensor or of one tensor per expert.

    Args:
        inputs: per batch a tensor (..., K), or a sequence of E tensors (t_e, K).

    Returns:
        one (H, count), or E of them, over all processes of the run.

    Raises:
        torch.OutOfMemoryError: in this process or in another one.
    """
    sums: list[SecondMoment] = []
    for batch in inputs:
        tensors = [batch] if isinstance(batch, Tensor) else batch
        if not sums:
            sums = [SecondMoment(x.shape[-1], x.device) for x in tensors]
        for moment, x in zip(sums, tensors, strict=True):
            moment.add(x)
    ranks.meet()
    for moment in sums:
        moment.add_up()
    return [(moment.finish(), moment.count) for moment in sums]


def with_prior(moments: Sequence[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    """Second moments of one layer's experts, each mixed with all of them pooled, in place.

    H_e <- (n_e H_e + K H_pooled) / (n_e + K): an expert that saw many more than K tokens keeps
    its own moment, a starved one is solved with what its siblings saw. Counts stay.
    """
    K = len(moments[0][0])
    total = sum(n for _, n in moments)
    pooled = torch.zeros_like(moments[0][0])
    for H, n in moments:
        pooled += H * (n / max(total, 1))
    for H, n in moments:
        H.mul_(n).add_(pooled, alpha=K).div_(n + K)
    return list(moments)


def capped(sizes: Tensor, times: float) -> Tensor:
    """`sizes`, but none above `times` their mean: of tokens, so that a few do not rule a sum.

    Trained models park huge activations on a few tokens, often the first (Sun et al. 2024,
    arXiv 2402.17762). There may be no sizes at all.
    """
    return sizes.minimum(times * sizes.mean())


def weight_roots(rows: Tensor, times: float) -> Tensor:
    """Square roots of weights of tokens (T, K) by which none has more than `times` the mean |x|^2.

    Float32 (T, 1).
    """
    square = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).square()
    square = square.clamp(min=torch.finfo(square.dtype).tiny)  # 1 for tokens of zeros
    return (capped(square, times) / square).sqrt()


def quadratic(D: Tensor, H: Tensor) -> Tensor:
    """d H d^T for every row d of D (N, K): (N,), computed in the dtype of D.

    H (K, K) is symmetric: what is below its block diagonal counts twice, what is above is not read.
    """
    K = len(H)
    step = min(-(-K // PANELS), ROWS)
    total = D.new_zeros(len(D))
    for start in range(0, K, step):
        rows = slice(start, start + step)
        part = D[:, rows]
        total += ((part @ H[rows, rows].to(D.dtype)) * part).sum(1)
        if start:
            total += ((part @ H[rows, :start].to(D.dtype)) * D[:, :start]).sum(1).mul_(2)
    return total
