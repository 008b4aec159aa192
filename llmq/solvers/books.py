"""Code books: tables by weighted k-means, outliers beside them, codes by rounding in turn.

Tables as in SqueezeLLM (Kim et al. 2023, arXiv 2306.07629, section 4): per row, the 2**bits values
that minimise sum_k H_kk (w_k - value)^2, here of weights over their group's largest. Outliers are
the weights that would stretch the table most, |w_k| sqrt(H_kk). Codes are then found as in GPTQ:
column by column, later columns absorb the error, outliers among them without one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.codebook import NF4, CodebookScheme, CodebookWeight, look_up, nearest, nf4
from llmq.errors import SchemeError
from llmq.factor import factor
from llmq.scheme import QuantScheme, grouped, stored
from llmq.solvers.babai import Pass
from llmq.solvers.gptq import alive, column_order
from llmq.solvers.grid import AT_ONCE


@dataclass(frozen=True)
class Codebook:
    """Solver for `CodebookScheme`.

    Args:
        feedback: round as GPTQ does; else every weight on its own.
        damp: see `GPTQ`.
        passes: of k-means, Lloyd's algorithm.
    """

    feedback: bool = True
    damp: float = 0.01
    passes: int = 20

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> CodebookWeight:
        """See `solvers.Solver.solve`.

        Raises:
            SchemeError: `scheme` is none with a code book.
        """
        if not isinstance(scheme, CodebookScheme):
            raise SchemeError(f"{scheme} has no code book.")
        H = alive(H)
        importance = H.diagonal()
        step = max(1, AT_ONCE // W.shape[1])
        parts = [_fitted(rows, importance, scheme, self.passes) for rows in W.split(step)]
        columns = (torch.cat([getattr(p, f) for p in parts]) for f in ("codes", "scale", "zero"))
        book = parts[0].book if scheme.book == "nf4" else torch.cat([p.book for p in parts])
        own = {f: torch.cat([getattr(p, f) for p in parts]) for f in ("index", "value")}
        q = CodebookWeight(scheme, *columns, book=book, **own)
        return _fed_back(W, H, q, self.damp) if self.feedback else q


def _fitted(W: Tensor, importance: Tensor, scheme: CodebookScheme, passes: int) -> CodebookWeight:
    """Outliers, scales, tables and nearest codes of rows W (N, K), for H's diagonal (K,)."""
    part, K = W.float(), W.shape[1]
    strength = part.abs() * importance.sqrt()
    index = strength.topk(scheme.kept(K), dim=1).indices.sort(1).values  # (N, c)
    value = W.gather(1, index)
    inside = torch.ones_like(part).scatter_(1, index, 0)  # 0 where the table need not reach
    groups = grouped(part * inside, scheme)  # (N, K/G, G)
    scale = stored(groups.abs().amax(-1), W.dtype, 1)  # (N, K/G)
    x = groups.div(scale.unsqueeze(-1)).flatten(1)
    if scheme.book == "nf4":
        book = nf4(W.device)
    else:
        squared = scale.square().unsqueeze(-1).expand_as(groups).flatten(1)
        weights = importance * squared * inside
        weights = weights / weights.mean(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        book = k_means(x, weights, _start(scheme.bits, W.device), passes).to(W.dtype)
    codes = nearest(x, book.float().expand(len(x), -1)).byte()
    zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    return CodebookWeight(
        scheme, codes, scale.to(W.dtype), zero, book=book, index=index.int(), value=value
    )


def _start(bits: int, device: torch.device) -> Tensor:
    """Where k-means begins, (2**bits,): NF4, or as many of its entries at even distances."""
    places = torch.linspace(0, len(NF4) - 1, 2**bits).round().long()
    return torch.tensor(NF4, device=device)[places.to(device)]


def k_means(x: Tensor, weights: Tensor, start: Tensor, passes: int) -> Tensor:
    """Weighted one-dimensional k-means of every row: float32 (N, C), ascending.

    Args:
        x: float32 (N, K).
        weights: float32 (N, K), not negative.
        start: (C,), ascending.
        passes: at most. An entry that nothing is nearest to stays where it is.
    """
    book = start.float().expand(len(x), -1).contiguous()
    for _ in range(passes):
        codes = nearest(x, book)
        mass = torch.zeros_like(book).scatter_add_(1, codes, weights)
        total = torch.zeros_like(book).scatter_add_(1, codes, weights * x)
        moved = torch.where(mass > 0, total / mass, book)
        if torch.equal(moved, book):
            break
        book = moved
    return book


def _fed_back(W: Tensor, H: Tensor, q: CodebookWeight, damp: float) -> CodebookWeight:
    """Round again, column by column; scales and tables stay, outliers take what is left."""
    order = column_order(H.diagonal(), q.shape[1], "static")
    babai = Pass(W, factor(H, damp, order), order)
    width = q.shape[1] // q.scale.shape[1]
    free = torch.zeros(q.shape, dtype=torch.bool, device=W.device)
    free = free.scatter_(1, q.index.long(), True).T[order]  # (K, N)
    book = q.book.float().expand(len(W), -1).contiguous()
    codes = torch.empty_like(babai.columns, dtype=torch.uint8)
    groups = (order // width).tolist()

    def rounded(number: int, wanted: Tensor) -> Tensor:
        scale = q.scale[:, groups[number]].unsqueeze(1)  # (N, 1)
        code = nearest(wanted.unsqueeze(1) / scale.float(), book)
        codes[number] = code.squeeze(1)
        found = look_up(code, scale, book).squeeze(1)
        return torch.where(free[number], wanted.to(W.dtype), found).float()

    babai.run(rounded)
    inverse = order.argsort()
    lost = babai.columns[inverse].T.gather(1, q.index.long())
    return CodebookWeight(
        q.scheme,
        codes[inverse].T.contiguous(),
        q.scale,
        q.zero,
        book=q.book,
        index=q.index,
        value=W.gather(1, q.index.long()).float().sub_(lost).to(W.dtype),
    )
