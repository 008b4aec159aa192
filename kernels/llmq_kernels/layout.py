"""The packed layout that every kernel reads: drawn in kernels/README.md, defined here.

Codes are stored in the order in which the lanes of a warp hold the left operand of
`mma.m16n8k16` / `wgmma.m64k16`, so that nothing moves between threads after unpacking. One block
covers 64 rows and 128 columns and is contiguous. Pure tensor functions, any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bitfields import parts, pieces, words_per_element
from .plan import COUNTERS_PER_TILE, TILE, UNIT, groups_per_line

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class PackedWeight:
    """One weight matrix (N, K), or E of them stacked, in the kernels' layout.

    Attributes:
        qweight: int32 (Nt, Kb, words): Nt = ceil(N / 64), Kb = ceil(K / 128).
        scale: (Nt, Kb, 64, P), any float dtype: P = 128 / G groups lie in a block. One group per
            row: (Nt, 1, 64, 1).
        zero: uint8, as `scale` but with rows r and r + 8 of each 16 side by side, or None: the
            zero point is 2**(bits - 1) everywhere.
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
    tiles, per_line = -(-N // TILE), groups_per_line(group_size)
    return PackedWeight(
        qweight=pack_codes(codes, bits),
        scale=_tiled(scale, per_line),
        zero=None if zero is None else _turned(_tiled(zero.to(torch.uint8), per_line), 8),
        counters=codes.new_zeros(tiles * COUNTERS_PER_TILE, dtype=torch.int32),
        bits=bits,
        group_size=group_size,
        shape=(N, K),
    )


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse of `pack`: codes (N, K), scale (N, K/G) and zero points (N, K/G) or None."""
    N, K = weight.shape
    groups = 1 if weight.group_size == -1 else K // weight.group_size
    zero = None if weight.zero is None else untile(_turned(weight.zero, 2), N, groups)
    return unpack_codes(weight.qweight, weight.bits, N, K), untile(weight.scale, N, groups), zero


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
    """uint8 codes (N, K) -> int32 (Nt, Kb, words), padded with zeros to whole blocks."""
    N, K = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -K % UNIT, 0, -N % TILE))
    # tile, m16, half, r, block, element, part, h2, c, e
    t = codes.view(-1, 4, 2, 8, codes.shape[1] // UNIT, _elements(bits), parts(bits), 2, 4, 2)
    t = t.permute(0, 4, 1, 3, 8, 5, 6, 7, 2, 9)  # tile, block, m16, r, c, element, ...
    shape = t.shape[:6]
    words = [codes.new_zeros(shape, dtype=torch.int32) for _ in range(words_per_element(bits))]
    for part, h2, half, e in _places(bits):
        code, done = t[..., part, h2, half, e].to(torch.int32), 0
        for piece in pieces(bits, part, h2, half):
            field = (code >> done) & ((1 << piece.width) - 1)
            words[piece.word] |= field << (piece.bit + 16 * e)
            done += piece.width
    return _to_memory([w.flatten(2, 4) for w in words], bits)


def unpack_codes(qweight: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 (N, K)."""
    words = element_words(qweight, bits)
    tiles, blocks = qweight.shape[:2]
    shape = (tiles, blocks, 4, 8, 4, _elements(bits))  # m16, r, c
    codes = []
    for part, h2, half, e in _places(bits):
        code, done = torch.zeros_like(words[0]), 0
        for piece in pieces(bits, part, h2, half):
            field = (words[piece.word] >> (piece.bit + 16 * e)) & ((1 << piece.width) - 1)
            code |= field << done
            done += piece.width
        codes.append(code.to(torch.uint8).view(shape))
    t = torch.stack(codes, -1).unflatten(-1, (parts(bits), 2, 2, 2))  # part, h2, half, e
    t = t.permute(0, 2, 8, 3, 1, 5, 6, 7, 4, 9)  # tile, m16, half, r, block, element, part, ...
    return t.reshape(tiles * TILE, blocks * UNIT)[:N, :K].contiguous()


def element_words(qweight: Tensor, bits: int) -> list[Tensor]:
    """(Nt, Kb, words) -> the first, second ... words of the elements, (Nt, Kb, 128, elements)."""
    tiles, blocks = qweight.shape[:2]
    lanes = (tiles, blocks, 128)
    if bits == 3:
        first = qweight[..., :512].reshape(*lanes, 2, 2)  # element, word
        return [first[..., 0], first[..., 1], qweight[..., 512:].reshape(*lanes, 2)]
    planes = qweight.view(tiles, blocks, -1, words_per_element(bits), 128, 4)
    return [w.transpose(2, 3).flatten(3) for w in planes.unbind(3)]


def _to_memory(words: list[Tensor], bits: int) -> Tensor:
    """Inverse of `element_words`."""
    if bits == 3:
        first = torch.stack(words[:2], -1)
        return torch.cat([first.flatten(2), words[2].flatten(2)], -1).contiguous()
    planes = torch.stack([w.unflatten(3, (-1, 4)).transpose(2, 3) for w in words], 3)
    return planes.flatten(2).contiguous()  # tile, block, (64 columns, word, lane, 4)


def _elements(bits: int) -> int:
    """Elements per lane and block."""
    return UNIT // (16 * parts(bits))


def _places(bits: int) -> Iterator[tuple[int, ...]]:
    """(part, h2, half, e) of an element's codes."""
    return itertools.product(range(parts(bits)), (0, 1), (0, 1), (0, 1))


def untile(values: Tensor, N: int, groups: int) -> Tensor:
    """(Nt, lines, 64, P) -> (N, K/G): scales or zero points in their plain order."""
    return values.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :groups].contiguous()


def _tiled(values: Tensor, per_line: int) -> Tensor:
    """(N, K/G) -> (Nt, lines, 64, P), padded with zeros."""
    N, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, -groups % per_line, 0, -N % TILE))
    return padded.view(-1, TILE, padded.shape[1] // per_line, per_line).transpose(1, 2).contiguous()


def _turned(tiled: Tensor, inner: int) -> Tensor:
    """`_tiled` values with rows r and r + 8 side by side (inner = 8); inner = 2: back in order."""
    return tiled.unflatten(2, (4, -1, inner)).transpose(3, 4).flatten(2, 4).contiguous()
