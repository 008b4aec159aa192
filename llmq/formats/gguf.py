"""GGUF blocks of llama.cpp, made directly from codes: nothing is quantized again.

32 weights of a row share a block; along K the blocks of a row follow each other.

    Q4_0   fp16 d, 16 bytes: byte j holds weight j (low half) and j + 16    w = d * (code - 8)
    Q4_1   fp16 d, fp16 m, 16 bytes likewise                                w = d * code + m
    Q8_0   fp16 d, 32 int8                                                  w = d * code

A group of 64, 128 or a row repeats its scale. Q4_0 holds 2, 3 and symmetric 4 bits exactly, Q8_0
symmetric 8 bits; Q4_1 holds asymmetric 4 bits up to the rounding of m = -zero * d to fp16.
Layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llmq.formats.columns import half_scales
from llmq.scheme import QuantizedWeight, QuantScheme

WIDTH = 32  # weights per block
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # per block
BlockType = Literal["Q4_0", "Q4_1", "Q8_0"]


def why_not(scheme: QuantScheme, N: int, K: int) -> str | None:
    """None if there is a block type for a matrix (N, K) in `scheme`, else the reason."""
    if scheme.group_width(K) % WIDTH:
        return f"in_features={K} in one group is not divisible by {WIDTH}"
    if scheme.bits == 8 and not scheme.symmetric:
        return "no block holds asymmetric 8 bits"
    return None


def block_type(scheme: QuantScheme) -> BlockType:
    """The smallest block that holds `scheme`."""
    if scheme.bits == 8:
        return "Q8_0"
    return "Q4_1" if scheme.bits == 4 and not scheme.symmetric else "Q4_0"


def blocks(q: QuantizedWeight) -> np.ndarray:
    """The rows of `q` in its `block_type`: uint8 (N, bytes of a row).

    Raises:
        SchemeError: a scale is too large for fp16.
    """
    kind, repeats = block_type(q.scheme), q.shape[1] // q.scale.shape[1] // WIDTH
    scale = half_scales(q).repeat_interleave(repeats, 1)  # (N, K/32)
    zero = q.zero.repeat_interleave(repeats, 1)
    codes = q.codes.unflatten(1, (-1, WIDTH))  # (N, K/32, 32)
    parts = [_bytes(scale)]
    if kind == "Q8_0":
        parts.append((codes.short() - q.scheme.middle).to(torch.int8).view(torch.uint8))
    else:
        if kind == "Q4_1":
            parts.append(_bytes(-(zero.float() * scale.float()).half()))
        else:  # codes of 2 and 3 bits move so that their zero is 8
            codes = codes + 8 - zero.unsqueeze(-1)
        parts.append(codes[..., :16] | codes[..., 16:] << 4)
    return torch.cat(parts, -1).flatten(1).numpy()


def _bytes(half: Tensor) -> Tensor:
    """fp16 (N, B) as uint8 (N, B, 2)."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def rope_rows(count: int, heads: int) -> Tensor:
    """Where llama.cpp's "llama" wants the rows of q and k, int64 (count,).

    It rotates neighbours where transformers rotates row i with row i + head_dim / 2.
    """
    return torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()
