"""The number format: integers in groups that share a scale and a zero point.

    W[n, k]  ~=  (codes[n, k] - zero[n, k // G]) * scale[n, k // G]

N = output features, K = input features, G = group size along K. Nothing in this file knows an
algorithm, a file layout or a device; everything else in llmq passes `QuantizedWeight` around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.errors import SchemeError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class QuantScheme:
    """How one weight matrix is stored.

    Args:
        bits: 2, 3, 4, 5, 6 or 8 bits per code.
        group_size: weights along the input dimension that share one scale: 32, 64, 128, or
            -1 for one group per row.
        symmetric: the zero point is fixed at 2**(bits - 1) and not stored.

    Raises:
        SchemeError: any other value.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SchemeError(f"bits={self.bits}: use one of {', '.join(map(str, BITS))}.")
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(
                f"group_size={self.group_size}: use one of {', '.join(map(str, GROUP_SIZES))} "
                "(-1 = one group per row)."
            )

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 2 ** (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Weights per group in a row of `in_features` weights."""
        return in_features if self.group_size == -1 else self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether a row of `in_features` weights splits into whole groups."""
        return in_features % self.group_width(in_features) == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, scales and zero points included."""
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead / self.group_width(in_features)


def wider_groups(group_size: int, in_features: int) -> list[int]:
    """Larger groups than those of `group_size` weights that a row of `in_features` divides into."""
    return [g for g in GROUP_SIZES if 0 < group_size < g and in_features % g == 0]


@dataclass(frozen=True)
class Undivided:
    """Matrices of one input width that the group size does not divide.

    Attributes:
        names: of the matrices.
        group_size: of their scheme.
        in_features: their input width K.
        fits: group sizes that would do.
    """

    names: tuple[str, ...]
    group_size: int
    in_features: int
    fits: tuple[int, ...]


def undivided(
    widths: Mapping[str, int], scheme_for: Callable[[str], QuantScheme | None]
) -> list[Undivided]:
    """Matrices that their group size does not divide, by group size and input width.

    Args:
        widths: matrix -> K.
        scheme_for: matrix -> its scheme, or None if it is not quantized.
    """
    bad: dict[tuple[int, int], list[str]] = {}
    for name, K in widths.items():
        scheme = scheme_for(name)
        if scheme and not scheme.divides(K):
            bad.setdefault((scheme.group_size, K), []).append(name)
    return [
        Undivided(tuple(names), G, K, (*(g for g in (128, 64, 32) if K % g == 0), -1))
        for (G, K), names in bad.items()
    ]


def check_groups(
    widths: Mapping[str, int], scheme_for: Callable[[str], QuantScheme | None]
) -> None:
    """Refuse a group size that does not divide some matrix, with what would; see `undivided`.

    Raises:
        SchemeError: lists the matrices.
    """
    bad = undivided(widths, scheme_for)
    if not bad:
        return
    named = [f"{name} (in_features={b.in_features})" for b in bad for name in b.names]
    listed = ", ".join(named[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")
    fits = [str(g) for g in bad[0].fits if all(g in b.fits for b in bad)]
    names = [name.removesuffix(".weight") for b in bad for name in b.names]
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    raise SchemeError(
        f"group_size={bad[0].group_size} does not divide {listed}. "
        f"Use group_size={' or '.join(fits)}, or skip these layers: "
        + " ".join(f"--skip '{end}'" for end in ends)
    )


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized matrix, unpacked: the value that solvers return and formats write.

    Attributes:
        scheme: the number format.
        codes: uint8 (N, K), values 0..scheme.qmax.
        scale: (N, K/G) in the dtype in which it is stored (bf16, fp16 or fp32), positive.
        zero: uint8 (N, K/G), values 0..scheme.qmax.
        order: int64 (K,), a permutation: column k stands for input order[k]; None = input k. Only
            checkpoints of other tools have one (see `formats.gptq`).
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1]

    def slices(self, weights: int = 1 << 22) -> Iterator[slice]:
        """Its rows in pieces of about so many weights, for sums whose terms are wide."""
        step = max(1, weights // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step)

    def rows(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some of its rows."""
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=self.zero[rows])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (N, K) these codes stand for, in `dtype` (default: the scale's).

        The product is taken in the scale's dtype, as every loader of such checkpoints does.
        """
        codes = self.codes.unflatten(1, (self.scale.shape[1], -1))  # (N, K/G, G)
        centred = codes.to(torch.int16) - self.zero.unsqueeze(-1)
        weight = centred.to(self.scale.dtype) * self.scale.unsqueeze(-1)
        weight = weight.flatten(1).to(dtype or self.scale.dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all parts, one below the other; they have one scheme and no order of columns."""
    if len(parts) == 1:
        return parts[0]
    codes, scale, zero = (
        torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scale", "zero")
    )
    return QuantizedWeight(parts[0].scheme, codes, scale, zero)


def empty(
    scheme: QuantScheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> QuantizedWeight:
    """A matrix (N, K) that is yet to be filled, with scales in `dtype`."""
    N, K = shape
    groups = K // scheme.group_width(K)
    return QuantizedWeight(
        scheme,
        torch.empty(N, K, dtype=torch.uint8, device=device),
        torch.empty(N, groups, dtype=dtype, device=device),
        torch.empty(N, groups, dtype=torch.uint8, device=device),
    )


def grouped(W: Tensor, scheme: QuantScheme) -> Tensor:
    """View a matrix (N, K) as its groups (N, K/G, G).

    Raises:
        SchemeError: the group size does not divide K.
    """
    K = W.shape[1]
    if not scheme.divides(K):
        raise SchemeError(f"in_features={K} is not divisible by group_size={scheme.group_size}.")
    return W.unflatten(1, (-1, scheme.group_width(K)))


def stored(scale: Tensor, dtype: torch.dtype, qmax: int) -> Tensor:
    """Round float32 scales to the dtype they are stored in, as float32.

    Codes must be chosen against this value, not against the unrounded one. The result is never
    zero, and small enough for the largest code times it to be finite in `dtype`.
    """
    limits = torch.finfo(dtype)
    # The smallest normal number, not the smallest subnormal: engines may flush those to zero.
    return scale.float().clamp(limits.tiny, limits.max / (qmax + 1)).to(dtype).float()


def minmax_grid(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid that just covers every group.

    Args:
        groups: float32 (..., G).
        scheme: the number format.
        dtype: the dtype in which scales will be stored.

    Returns:
        scale and zero, float32 (...); the scale is already rounded to `dtype`.
    """
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if scheme.symmetric:
        scale = stored(torch.maximum(-low, high) * (2 / scheme.qmax), dtype, scheme.qmax)
        return scale, torch.full_like(scale, scheme.middle)
    scale = stored((high - low) / scheme.qmax, dtype, scheme.qmax)
    return scale, (-low / scale).round_().clamp_(0, scheme.qmax)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Nearest codes, float32 (..., G), of `groups` (..., G) on the grid `scale`, `zero` (...)."""
    return groups.div(scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, qmax)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights (..., G) that float32 `codes` (..., G) stand for on `scale`, `zero` (...)."""
    return codes.sub(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def round_to_grid(
    W: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, dtype: torch.dtype
) -> QuantizedWeight:
    """Round every weight of W (N, K) to the nearest point of the given grid.

    Args:
        W: float32 (N, K).
        scale: float32 (N, K/G), already rounded to `dtype` (see `stored`).
        zero: float32 or uint8 (N, K/G).
        scheme: the number format.
        dtype: the dtype in which the scales are stored.
    """
    codes = encode(grouped(W.float(), scheme), scale, zero.float(), scheme.qmax)
    return QuantizedWeight(scheme, codes.flatten(1).byte(), scale.to(dtype), zero.byte())
