"""GGUF blocks of llama.cpp, made directly from codes: nothing is quantized again.

32 weights of a row share a block; along K the blocks of a row follow each other.

    Q4_0   fp16 d, 16 bytes: byte j holds weight j (low half) and j + 16    w = d * (code - 8)
    Q4_1   fp16 d, fp16 m, 16 bytes likewise                                w = d * code + m
    Q5_0   fp16 d, 4 bytes: bit j is the fifth of weight j, then as Q4_0    w = d * (code - 16)
    Q5_1   fp16 d, fp16 m, 4 bytes, 16 bytes likewise                       w = d * code + m
    Q8_0   fp16 d, 32 int8                                                  w = d * code

A group of 64, 128 or a row repeats its scale. Q4_0 holds 2, 3 and symmetric 4 bits exactly, Q5_0
symmetric 5 bits, Q8_0 6 and symmetric 8 bits; Q4_1 and Q5_1 hold asymmetric 4 and 5 bits up to the
rounding of m = -zero * d to fp16.
Smaller blocks, whose scales are rounded, are in `kquants`. Layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llmq.formats import kquants
from llmq.formats.columns import half_scales
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.superblocks import KINDS, SuperBlockScheme, SuperBlockWeight

WIDTH = 32  # weights per plain block
BlockType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] | kquants.Kind
# type -> (weights, bytes) of a block
BLOCKS: dict[BlockType, tuple[int, int]] = {
    "Q4_0": (WIDTH, 18),
    "Q4_1": (WIDTH, 20),
    "Q5_0": (WIDTH, 22),
    "Q5_1": (WIDTH, 24),
    "Q8_0": (WIDTH, 34),
    **{kind: (kquants.WIDTH, size) for kind, size in kquants.BYTES.items()},
}
# (bits, symmetric) -> what is smaller than the plain block that holds it
_SMALLER: dict[tuple[int, bool], kquants.Kind] = {
    (2, True): "Q2_K",
    (2, False): "Q2_K",
    (3, True): "Q3_K",
    (4, False): "Q4_K",
    (5, False): "Q5_K",
}


def why_not(scheme: QuantScheme, N: int, K: int) -> str | None:
    """None if there is a block type for a matrix (N, K) in `scheme`, else the reason."""
    if isinstance(scheme, SuperBlockScheme):
        return None
    if scheme.group_width(K) % WIDTH:
        return f"in_features={K} in one group is not divisible by {WIDTH}"
    if scheme.bits == 8 and not scheme.symmetric:
        return "no block holds asymmetric 8 bits"
    return None


def block_type(scheme: QuantScheme, K: int, k_quants: bool = False) -> BlockType:
    """The smallest plain block that holds `scheme`; with `k_quants`, a smaller one if there is.

    A matrix that was solved in super-blocks stays in them.
    """
    if isinstance(scheme, SuperBlockScheme):
        return KINDS[scheme.bits]
    smaller = _SMALLER.get((scheme.bits, scheme.symmetric))
    if k_quants and smaller and K % kquants.WIDTH == 0:
        return smaller
    if scheme.bits > 5:
        return "Q8_0"
    if scheme.bits == 5:
        return "Q5_0" if scheme.symmetric else "Q5_1"
    return "Q4_1" if scheme.bits == 4 and not scheme.symmetric else "Q4_0"


def row_bytes(kind: BlockType, K: int) -> int:
    """Bytes of a row of K weights."""
    width, size = BLOCKS[kind]
    return K // width * size


def blocks(q: QuantizedWeight, kind: BlockType) -> tuple[np.ndarray, float]:
    """The rows of `q` as blocks of `kind`, one that `block_type` names for it.

    Returns:
        uint8 (N, `row_bytes`), and the relative change of a matrix that was projected into K-quants
        (Frobenius norm); 0 for others.

    Raises:
        SchemeError: a scale is too large for fp16.
    """
    if isinstance(q, SuperBlockWeight):
        return q.blocks().bytes().numpy(), 0.0
    if kind in kquants.BYTES:
        found = kquants.project(q, kind)  # type: ignore[arg-type]
        before = replace(q, scale=q.scale.float()).dequantize()  # products in float32
        change = (found.weight() - before).norm() / before.norm().clamp(min=1e-30)
        return found.bytes().numpy(), float(change)
    repeats = q.shape[1] // q.scale.shape[1] // WIDTH
    scale = half_scales(q).repeat_interleave(repeats, 1)  # (N, K/32)
    zero = q.zero.repeat_interleave(repeats, 1)
    codes = q.codes.unflatten(1, (-1, WIDTH))  # (N, K/32, 32)
    parts = [_bytes(scale)]
    if kind == "Q8_0":
        parts.append((codes.short() - zero.unsqueeze(-1)).to(torch.int8).view(torch.uint8))
    else:
        if kind in ("Q4_1", "Q5_1"):
            parts.append(_bytes(-(zero.float() * scale.float()).half()))
        elif kind == "Q4_0":  # codes of 2 and 3 bits move so that their zero is 8
            codes = codes + 8 - zero.unsqueeze(-1)
        if kind in ("Q5_0", "Q5_1"):
            eight = torch.arange(8, dtype=torch.uint8)
            parts.append(((codes >> 4).unflatten(-1, (4, 8)) << eight).sum(-1, dtype=torch.uint8))
            codes = codes & 15
        parts.append(codes[..., :16] | codes[..., 16:] << 4)
    return torch.cat(parts, -1).flatten(1).numpy(), 0.0


def rounded(W: Tensor, kind: Literal["Q6_K", "Q8_0"]) -> np.ndarray:
    """A dense matrix float32 (N, K), its rows rounded to nearest in blocks of `kind`."""
    if kind == "Q6_K":
        return kquants.round_to_q6(W).bytes().numpy()
    groups = W.unflatten(1, (-1, WIDTH))  # (N, K/32, 32)
    scale = (groups.abs().amax(-1) / 127).half()
    codes = groups.div(scale.float().unsqueeze(-1)).nan_to_num_(0, 0, 0).round_().clamp_(-127, 127)
    return torch.cat([_bytes(scale), codes.to(torch.int8).view(torch.uint8)], -1).flatten(1).numpy()


def _bytes(half: Tensor) -> Tensor:
    """fp16 (N, B) as uint8 (N, B, 2)."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def rope_rows(count: int, heads: int) -> Tensor:
    """Where llama.cpp's "llama" wants the rows of q and k, int64 (count,).

    It rotates neighbours where transformers rotates row i with row i + head_dim / 2.
    """
    return torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()
