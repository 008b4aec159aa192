"""Weights that are entries of a table, and a few per row beside it: NF4 and learned code books.

    W[n, k]  ~=  book[n, codes[n, k]] * scale[n, k // G],   or a value of its own (an outlier)

"nf4" is one table for all rows: the 16 quantiles of a normal distribution of Dettmers et al. 2023
(QLoRA, arXiv 2305.14314, appendix E). "learned" is a table per row, as in SqueezeLLM (Kim et al.
2023, arXiv 2306.07629), from which the outliers ("dense and sparse") come too. No engine but llmq
reads them, and llmq has no kernel for them: weights are looked up, then multiplied densely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from llmq.errors import SchemeError
from llmq.scheme import QuantizedWeight, QuantScheme

BOOKS = {"nf4": (4,), "learned": (2, 3, 4)}  # book -> bits
MOST_OUTLIERS = 0.05
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class CodebookScheme(QuantScheme):
    """A number format whose codes are indices of a table.

    Args:
        bits: 4 for "nf4"; 2, 3 or 4 for "learned".
        group_size: weights that share a scale; -1 = one per row.
        symmetric: True: a table has no zero point.
        book: "nf4" or "learned".
        outliers: share of every row's weights that is kept in the dtype of the scales, 0 to 0.05.

    Raises:
        SchemeError: any other value.
    """

    symmetric: bool = True
    book: str = "nf4"
    outliers: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.book not in BOOKS:
            raise SchemeError(f"codebook={self.book!r}: use one of {', '.join(BOOKS)}.")
        if self.bits not in BOOKS[self.book]:
            fits = ", ".join(map(str, BOOKS[self.book]))
            raise SchemeError(f"bits={self.bits}: code book {self.book!r} has {fits} bits.")
        if not self.symmetric:
            raise SchemeError("A code book has no zero points: leave --asymmetric away.")
        if not 0 <= self.outliers <= MOST_OUTLIERS:
            raise SchemeError(f"outliers={self.outliers}: use a share of 0 to {MOST_OUTLIERS}.")

    def kept(self, in_features: int) -> int:
        """Outliers in a row of `in_features` weights."""
        return ceil(self.outliers * in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        table = 2**self.bits * scale_bits if self.book == "learned" else 0
        beside = table + self.kept(in_features) * (scale_bits + 32)
        return super().bits_per_weight(in_features, scale_bits) + beside / in_features


@dataclass(frozen=True)
class CodebookWeight(QuantizedWeight):
    """One matrix (N, K) in a code book. Codes index `book`; `zero` says nothing.

    Attributes:
        book: (1, 2**bits) float32 for "nf4", else (N, 2**bits) in the scales' dtype; ascending.
        index: int32 (N, c), the columns of a row's outliers, ascending; c may be 0.
        value: (N, c) in the scales' dtype, what is there.
    """

    # Defaults only because those of the base have some.
    book: Tensor = None  # type: ignore[assignment]
    index: Tensor = None  # type: ignore[assignment]
    value: Tensor = None  # type: ignore[assignment]

    def rows(self, rows: slice | Tensor) -> CodebookWeight:
        base = super().rows(rows)
        assert isinstance(base, CodebookWeight)
        book = self.book if len(self.book) == 1 else self.book[rows]
        return replace(base, book=book, index=self.index[rows], value=self.value[rows])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.codes.new_empty(self.shape, dtype=dtype or self.scale.dtype)
        for rows in self.slices(1 << 20):
            part = self.rows(rows)
            looked_up = look_up(part.codes, part.scale, part.book)
            weight[rows] = looked_up.scatter_(1, part.index.long(), part.value)
        return weight


def look_up(codes: Tensor, scale: Tensor, book: Tensor) -> Tensor:
    """The weights (N, K) that codes stand for, in the scales' dtype; products are float32.

    Args:
        codes: integers (N, K).
        scale: (N, K/G).
        book: (N, 2**bits), or (1, 2**bits) for all rows.
    """
    entries = book.float().expand(len(codes), -1).gather(1, codes.long())
    entries = entries.unflatten(1, (scale.shape[1], -1)).mul_(scale.float().unsqueeze(-1))
    return entries.flatten(1).to(scale.dtype)


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest entry, int64 (N, K), for float32 x (N, K) and ascending book (N, C)."""
    middles = (book[:, 1:] + book[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), x.contiguous())


def nf4(device: torch.device | str | None = None) -> Tensor:
    """The table of NF4, float32 (1, 16)."""
    return torch.tensor([NF4], device=device)
