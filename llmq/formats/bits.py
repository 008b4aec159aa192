"""Codes of 2 to 8 bits in 32-bit words: one dense little-endian bit stream.

Code i occupies bits [i * bits, (i + 1) * bits), whatever word they fall into; codes of 3, 5 and 6
bits may straddle two words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the bit positions repeat: (8, 1) for 4 bits, (32, 3) for 3."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def pack_bits(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along `dim` into a dense little-endian stream of int32 words.

    Args:
        codes: integer tensor, values 0..2**bits - 1.
        bits: 2 to 8.
        dim: the dimension to pack; its size n becomes ceil(n * bits / 32).

    Returns:
        int32, contiguous.
    """
    codes = codes.movedim(dim, -1)
    count = codes.shape[-1]
    per_codes, per_words = _period(bits)
    padded = torch.nn.functional.pad(codes, (0, -count % per_codes))
    blocks = padded.unflatten(-1, (-1, per_codes))  # (..., n/P, P)
    packed = torch.zeros(*blocks.shape[:-1], per_words, dtype=torch.int32, device=codes.device)
    for i in range(per_codes):
        word, offset = divmod(i * bits, 32)
        code = blocks[..., i].to(torch.int32)
        packed[..., word] |= code << offset
        if offset + bits > 32:
            packed[..., word + 1] |= code >> (32 - offset)
    return packed.flatten(-2)[..., : words(count, bits)].movedim(-1, dim).contiguous()


def unpack_bits(packed: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: int32.
        bits: 2 to 8.
        size: the number of codes along `dim`.
        dim: the packed dimension.

    Returns:
        uint8, contiguous, `size` codes along `dim`.
    """
    packed = packed.movedim(dim, -1).contiguous()
    if bits == 8:
        return packed.view(torch.uint8)[..., :size].movedim(-1, dim).contiguous()
    if bits == 4:  # two codes per byte: spread each byte over 16 bits, low half first
        pairs = packed.view(torch.uint8).to(torch.int16)
        pairs = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
        return pairs.view(torch.uint8)[..., :size].movedim(-1, dim).contiguous()
    per_codes, per_words = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % per_words))
    blocks = padded.unflatten(-1, (-1, per_words))  # (..., n/P, W)
    codes = torch.empty(*blocks.shape[:-1], per_codes, dtype=torch.uint8, device=packed.device)
    for i in range(per_codes):
        word, offset = divmod(i * bits, 32)
        low = min(bits, 32 - offset)
        code = (blocks[..., word] >> offset) & (2**low - 1)  # the mask also drops the sign
        if low < bits:
            code |= (blocks[..., word + 1] & (2 ** (bits - low) - 1)) << low
        codes[..., i] = code
    return codes.flatten(-2)[..., :size].movedim(-1, dim).contiguous()
