"""The packed layout that every kernel reads: drawn in kernels/README.md, defined here.

Codes are stored in the order in which the lanes of a warp hold the left operand of
`mma.m16n8k16` / `wgmma.m64k16`, so that nothing moves between threads after unpacking. One block
covers 64 rows and `unit(bits)` columns and is contiguous. Pure tensor functions, any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .plan import COUNTERS_PER_TILE, TILE, unit

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class PackedWeight:
    """One weight matrix (N, K), or E of them stacked, in the kernels' layout.

    Attributes:
        qweight: int32 (Nt, Ku, words): Nt = ceil(N / 64), Ku = ceil(K / unit(bits)).
        scale: (Nt, K/G, 64), any float dtype.
        zero: uint8 (Nt, K/G, 64), or None: the zero point is 2**(bits - 1) everywhere.
        counters: int32 (Nt * 4,), zero before and after every launch: arrivals under split-K.
        bits: 2, 3, 4 or 8.
        group_size: 32, 64, 128 or -1.
        shape: (N, K), without padding.
    Stacked experts have a leading dimension E on `qweight`, `scale` and `zero`.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    counters: Tensor
    bits: int
    group_size: int
    shape: tuple[int, int]

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return replace(
            self,
            qweight=self.qweight.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
            counters=self.counters.to(device),
        )


def pack(
    codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> PackedWeight:
    """Pack one matrix.

    Args:
        codes: uint8 (N, K), values 0..2**bits - 1.
        scale: (N, K/G), float.
        zero: integer (N, K/G), or None for the symmetric zero point 2**(bits - 1).
        bits: 2, 3, 4 or 8.
        group_size: 32, 64, 128, or -1 for one group per row.

    Raises:
        ValueError: bits or group size outside those lists, or shapes that do not fit them.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"bits={bits}, group_size={group_size}: the layout holds {BITS} bits in "
                         f"groups of {GROUP_SIZES}.")  # fmt: skip
    N, K = codes.shape
    groups = 1 if group_size == -1 else K // group_size
    if scale.shape != (N, groups) or (group_size != -1 and K % group_size):
        raise ValueError(
            f"codes {tuple(codes.shape)} and scale {tuple(scale.shape)} do not agree with "
            f"group_size={group_size}."
        )
    tiles = -(-N // TILE)
    return PackedWeight(
        qweight=pack_codes(codes, bits),
        scale=_tiled(scale),
        zero=None if zero is None else _tiled(zero.to(torch.uint8)),
        counters=codes.new_zeros(tiles * COUNTERS_PER_TILE, dtype=torch.int32),
        bits=bits,
        group_size=group_size,
        shape=(N, K),
    )


def stack(experts: list[PackedWeight]) -> PackedWeight:
    """E matrices of one shape and format as one stacked weight for the grouped kernel."""
    first = experts[0]
    zeros = [e.zero for e in experts if e.zero is not None]
    return replace(
        first,
        qweight=torch.stack([e.qweight for e in experts]),
        scale=torch.stack([e.scale for e in experts]),
        zero=torch.stack(zeros) if zeros else None,
        counters=torch.cat([e.counters for e in experts]),
    )


def join_rows(weights: list[PackedWeight]) -> PackedWeight:
    """Matrices with one input (q, k, v or gate, up) as one: rows are concatenated.

    Raises:
        ValueError: different formats or inputs, or a part whose rows do not fill its tiles.
    """
    first = weights[0]
    same = all(
        (w.bits, w.group_size, w.shape[1], w.zero is None)
        == (first.bits, first.group_size, first.shape[1], first.zero is None)
        for w in weights
    )
    if not same or any(w.shape[0] % TILE for w in weights[:-1]):
        raise ValueError("Only weights of one format and input, N % 64 == 0, can be joined.")
    zeros = [w.zero for w in weights if w.zero is not None]
    return replace(
        first,
        qweight=torch.cat([w.qweight for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zero=torch.cat(zeros) if zeros else None,
        counters=torch.cat([w.counters for w in weights]),
        shape=(sum(w.shape[0] for w in weights), first.shape[1]),
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (N, K) -> int32 (Nt, Ku, words), padded with zeros to whole blocks."""
    N, K = codes.shape
    columns = unit(bits)
    codes = torch.nn.functional.pad(codes, (0, -K % columns, 0, -N % TILE))
    # tile, m16, half, r, block, word, chunk, h2, c, e
    t = codes.view(-1, 4, 2, 8, codes.shape[1] // columns, 4, columns // 64, 2, 4, 2)
    t = t.permute(0, 4, 1, 3, 8, 5, 6, 2, 7, 9)  # tile, block, m16, r, c, word, chunk, half, h2, e
    planes = [_deposit(plane, shifts) for plane, shifts in _planes(t, bits)]
    return torch.cat([p.flatten(2) for p in planes], dim=-1).contiguous()


def unpack_codes(qweight: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 (N, K)."""
    lanes = (*qweight.shape[:2], 4, 8, 4)  # tile, block, m16, r, c
    chunks = unit(bits) // 64
    if bits == 8:
        halves = [
            _extract(p.reshape(*lanes, 4), _shifts(2, 1, 8), 255) for p in qweight.chunk(2, -1)
        ]
        t = torch.stack([h.view(*lanes, 4, 1, 2, 2) for h in halves], dim=-2)
    else:
        width = min(bits, 2) if bits != 4 else 4
        t = _extract(qweight[..., :512].reshape(*lanes, 4), _shifts(4, chunks, width), 2**width - 1)
        t = t.view(*lanes, 4, chunks, 2, 2, 2)  # chunk, h2, half, e
        t = t.transpose(-2, -3)
        if bits == 3:
            top = _extract(qweight[..., 512:].reshape(*lanes, 2), _shifts(4, 4, 1), 1)
            t = t | top.view(*lanes, 2, 2, 2, 2, 2, 2).transpose(-2, -3).reshape(t.shape) << 2
    t = t.permute(0, 2, 7, 3, 1, 5, 6, 8, 4, 9)  # tile, m16, half, r, block, word, chunk, h2, c, e
    return t.reshape(lanes[0] * TILE, lanes[1] * unit(bits))[:N, :K].contiguous()


def untile(values: Tensor, N: int) -> Tensor:
    """(Nt, K/G, 64) -> (N, K/G): scales or zero points in their plain order."""
    return values.transpose(1, 2).flatten(0, 1)[:N]


def _tiled(values: Tensor) -> Tensor:
    """(N, K/G) -> (Nt, K/G, 64), padded with zeros."""
    N, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -N % TILE))
    return padded.view(-1, TILE, groups).transpose(1, 2).contiguous()


def _shifts(pairs: int, chunks: int, width: int) -> list[int]:
    """Bit positions of (chunk, pair, e): pairs from bit 0 up, their second halves 16 above."""
    return [
        (c * pairs + p) * width + 16 * e
        for c in range(chunks)
        for p in range(pairs)
        for e in (0, 1)
    ]


def _planes(t: Tensor, bits: int) -> list[tuple[Tensor, list[int]]]:
    """The words of each plane as (fields in bit order, shifts).

    `t` is (tile, block, m16, r, c, word, chunk, half, h2, e); a pair is (h2, half).
    """
    chunks = t.shape[6]
    if bits == 8:
        return [(t[..., h2, :].flatten(6), _shifts(2, 1, 8)) for h2 in (0, 1)]
    t = t.transpose(-2, -3)  # chunk, h2, half, e
    if bits == 3:
        low = (t & 3).flatten(6)
        top = (t >> 2).unflatten(5, (2, 2)).flatten(6)
        return [(low, _shifts(4, 2, 2)), (top, _shifts(4, 4, 1))]
    return [(t.flatten(6), _shifts(4, chunks, bits))]


def _deposit(fields: Tensor, shifts: list[int]) -> Tensor:
    """uint8 (..., J) at bit positions shifts[J] -> int32 (...)."""
    words = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=fields.device)
    for j, shift in enumerate(shifts):
        words |= fields[..., j].to(torch.int32) << shift
    return words


def _extract(words: Tensor, shifts: list[int], mask: int) -> Tensor:
    """Inverse of `_deposit`: int32 (...) -> uint8 (..., J)."""
    return torch.stack([((words >> s) & mask).to(torch.uint8) for s in shifts], dim=-1)
