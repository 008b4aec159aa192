"""Choose a group's grid by rounding the group to it in earnest.

`grid.search_grid` judges a grid by the error of rounding every weight on its own. GPTQ does better
than that: what one column loses, the later ones partly make good, and how well they can depends on
the grid. So the best grids of the search are tried: GPTQ's pass over the columns of the group is
run for each of them, and the sum of its squared scaled errors, which is the group's share of the
layer's output error (Frantar et al. 2022, section 3.1), decides row by row. Then scales near the
best one are tried as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.scheme import QuantScheme, stored
from llmq.solvers.grid import AT_ONCE, by_column, shortlist
from llmq.solvers.loops import trial_errors

NEAR = (0.88, 0.91, 0.94, 0.97, 1.03, 1.06, 1.09, 1.12)  # of the best scale so far


def tried_grid(
    columns: Tensor, U: Tensor, scheme: QuantScheme, dtype: torch.dtype, count: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row for the group of columns that GPTQ rounds next.

    Args:
        columns: float32 (G, N), as they are when the group is reached.
        U: float32 (G, G), the inverse of the group's diagonal block of the factor of H, which is
            the block of the factor of H^-1.
        scheme: the number format.
        dtype: the dtype in which scales are stored.
        count: how many grids of the search are tried, each as it is and with its scale refitted.

    Returns:
        scale and zero, float32 (N,), scale rounded to `dtype`.
    """
    weights = U.diagonal().double().pow(-2).float()
    chosen = []
    for part in columns.split(max(1, AT_ONCE // (2 * count * len(columns))), dim=1):
        grids = shortlist(part.T.contiguous(), scheme, dtype, by_column(weights), count)
        scale, zero, error = _best(part, U, *grids, scheme.qmax)
        near = stored(scale * scale.new_tensor(NEAR).unsqueeze(1), dtype, scheme.qmax)
        closer, _, least = _best(part, U, near, zero.expand_as(near), scheme.qmax)
        chosen.append((torch.where(least < error, closer, scale), zero))
    scales, zeros = zip(*chosen, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _best(
    columns: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of C grids, `scales` and `zeros` (C, N), the best one of every row and its error, (N,)."""
    errors = trial_errors(columns, U, scales, zeros, qmax)
    best = errors.argmin(0, keepdim=True)
    scale, zero, error = (t.gather(0, best)[0] for t in (scales, zeros, errors))
    return scale, zero, error
