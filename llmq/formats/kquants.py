"""Super-blocks of llama.cpp ("K-quants"): 256 weights of a row whose scales are small integers.

    Q2_K    84 bytes   groups of 16   w = (d * s) * code - m * l     s and l of 4 bits
    Q3_K   110 bytes   groups of 16   w = (d * s) * (code - 4)       s of 6 bits, signed
    Q4_K   144 bytes   groups of 32   w = (d * s) * code - m * l     s and l of 6 bits
    Q5_K   176 bytes   groups of 32   w = (d * s) * code - m * l     s and l of 6 bits
    Q6_K   210 bytes   groups of 16   w = (d * s) * (code - 32)      s of 8 bits, signed

d and m are fp16, one of each per 256 weights. `project` puts codes that are already solved into
them: codes stay, and scales and offsets move to the nearest ones that these integers can express.
`round_to_q6` rounds a dense matrix. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import SchemeError
from llmq.scheme import QuantizedWeight

WIDTH = 256  # weights per super-block
Kind = Literal["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
BYTES: dict[Kind, int] = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
GROUP: dict[Kind, int] = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}
TOP: dict[Kind, int] = {"Q2_K": 15, "Q3_K": 31, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127}  # largest s
MIDDLE: dict[Kind, int] = {"Q3_K": 4, "Q6_K": 32}  # the code of 0 in kinds without offsets


@dataclass(frozen=True)
class SuperBlocks:
    """A matrix (N, K) in S = K/256 super-blocks per row, C = 256 / `GROUP` groups in each.

    Attributes:
        kind: how it is stored.
        codes: uint8 (N, S, 256).
        step: fp16 (N, S, 1), d above.
        scales: int16 (N, S, C), s above.
        low_step: fp16 (N, S, 1), m above; 0 in kinds without offsets.
        lows: int16 (N, S, C), l above.
    """

    kind: Kind
    codes: Tensor
    step: Tensor
    scales: Tensor
    low_step: Tensor
    lows: Tensor

    def weight(self) -> Tensor:
        """The matrix float32 (N, K), bit for bit as readers of the format compute it."""
        codes = self.codes.unflatten(-1, (-1, GROUP[self.kind])).float()  # (N, S, C, G)
        scale = (self.step.float() * self.scales).unsqueeze(-1)
        if self.kind in MIDDLE:
            weight = scale * (codes - MIDDLE[self.kind])
        else:
            weight = scale * codes - (self.low_step.float() * self.lows).unsqueeze(-1)
        return weight.flatten(1)

    def bytes(self) -> Tensor:
        """The rows as they are stored, uint8 (N, S * `BYTES`)."""
        pack, _ = _LAYOUTS[self.kind]
        return torch.cat(pack(self), -1).flatten(1)


def from_bytes(kind: Kind, rows: Tensor) -> SuperBlocks:
    """Undo `SuperBlocks.bytes`: rows uint8 (N, S * `BYTES`)."""
    _, unpack = _LAYOUTS[kind]
    return unpack(rows.unflatten(1, (-1, BYTES[kind])))


def project(q: QuantizedWeight, kind: Kind) -> SuperBlocks:
    """Codes of `q` as they are, in super-blocks: Q2_K (2 bits), Q3_K (symmetric 3), Q4_K, Q5_K.

    Scales go to the integers and the step that are nearest in squares, weighted by how far the
    codes of a group spread. An offset then takes up what its group's new scale moved on average.
    What this costs is the difference between `weight` and `q.dequantize`.

    Raises:
        SchemeError: a scale is too large for fp16.
    """
    K = q.shape[1]
    repeats = K // q.scale.shape[1] // GROUP[kind]

    def per_group(t: Tensor) -> Tensor:
        return t.float().repeat_interleave(repeats, 1).unflatten(1, (-1, WIDTH // GROUP[kind]))

    scale, zero = per_group(q.scale), per_group(q.zero)  # (N, S, C)
    codes = q.codes.unflatten(1, (-1, WIDTH))
    groups = codes.unflatten(-1, (-1, GROUP[kind])).float()  # (N, S, C, G)
    mean = groups.mean(-1)
    centre = zero if q.scheme.symmetric else mean
    spread = (groups - centre.unsqueeze(-1)).square().sum(-1)
    step, scales = multiples(scale, spread, TOP[kind])
    if kind in MIDDLE:
        low_step, lows = torch.zeros_like(step), torch.zeros_like(scales)
    elif q.scheme.symmetric:  # an offset of middle * scale, exactly
        low_step, lows = step * q.scheme.middle, scales
    else:
        moved = (step.float() * scales - scale) * mean
        wanted = (scale * zero + moved).clamp_(min=0)
        low_step, lows = multiples(wanted, torch.ones_like(wanted), TOP[kind])
    if not bool(step.isfinite().all() and low_step.isfinite().all()):
        raise SchemeError(f"a scale of {float(q.scale.max()):g} is too large for float16.")
    return SuperBlocks(kind, codes, step, scales, low_step, lows)


def multiples(values: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The step, fp16 (..., 1), and integers 0..top, int16 (..., C), whose products are nearest.

    Args:
        values: float32 (..., C), not negative.
        weights: of their squared errors, (..., C).
        top: largest integer.
    """
    largest = values.amax(-1, keepdim=True)
    best_step, best = (largest / top).half(), torch.zeros_like(values)
    best_error = torch.full_like(largest, torch.inf)
    for count in range(top, top // 2, -1):  # the integer that the largest value gets
        step = (largest / count).half()
        whole = values.div(step.float()).nan_to_num_(0, 0).round_().clamp_(0, top)
        error = (whole * step.float() - values).square_().mul_(weights).sum(-1, keepdim=True)
        better = error < best_error
        best_step = torch.where(better, step, best_step)
        best = torch.where(better, whole, best)
        best_error = torch.where(better, error, best_error)
    return best_step, best.short()


def round_to_q6(W: Tensor) -> SuperBlocks:
    """A dense matrix float32 (N, K), K a multiple of 256, rounded to nearest in Q6_K.

    The weight of a group that is farthest from 0 gets the code 0, the only one that reaches 32
    steps away.
    """
    groups = W.unflatten(1, (-1, WIDTH // GROUP["Q6_K"], GROUP["Q6_K"]))  # (N, S, C, G)
    far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = far / -MIDDLE["Q6_K"]  # (N, S, C)
    top = TOP["Q6_K"]
    step = (scale.abs().amax(-1, keepdim=True) / top).half()
    scales = scale.div(step.float()).nan_to_num_(0, 0, 0).round_().clamp_(-top, top)
    exact = groups / (step.float() * scales).unsqueeze(-1)
    codes = exact.nan_to_num_(0, 0, 0).round_().add_(MIDDLE["Q6_K"]).clamp_(0, 63).byte()
    none = torch.zeros_like(step)
    return SuperBlocks("Q6_K", codes.flatten(2), step, scales.short(), none, scales.short() * 0)


def _half(step: Tensor) -> Tensor:
    """fp16 (N, S, 1) as uint8 (N, S, 2)."""
    return step.contiguous().view(torch.uint8)


def _joined(parts: Tensor, dim: int, bits: int) -> Tensor:
    """Parts along `dim`, `bits` wide each, in one byte; the first lies lowest."""
    shifts = torch.arange(parts.shape[dim], dtype=torch.uint8, device=parts.device) * bits
    shape = [1] * parts.ndim
    shape[dim] = -1
    return (parts << shifts.view(shape)).sum(dim, dtype=torch.uint8)


def _parted(joined: Tensor, dim: int, bits: int) -> Tensor:
    """Undo `_joined`: a new dimension `dim` of 8 / bits parts."""
    shifts = range(0, 8, bits)
    return torch.stack([(joined >> shift) & (2**bits - 1) for shift in shifts], dim)


def _halves(block: Tensor) -> Tensor:
    """Undo `_half`."""
    return block.contiguous().view(torch.half)


def _pack_q2(b: SuperBlocks) -> list[Tensor]:
    scales = _joined(torch.stack([b.scales, b.lows], -1).byte(), -1, 4)
    low = _joined(b.codes.unflatten(-1, (2, 4, 32)), -2, 2).flatten(2)
    return [scales, low, _half(b.step), _half(b.low_step)]


def _pack_q3(b: SuperBlocks) -> list[Tensor]:
    high = _joined(b.codes.unflatten(-1, (8, 32)) >> 2, -2, 1)
    low = _joined(b.codes.unflatten(-1, (2, 4, 32)) & 3, -2, 2).flatten(2)
    scales = (b.scales + 32).byte()
    nibbles = _joined((scales & 15).unflatten(-1, (2, 8)), -2, 4)
    rest = _joined((scales >> 4).unflatten(-1, (4, 4)), -2, 2)
    return [high, low, nibbles, rest, _half(b.step)]


def _pack_q4(b: SuperBlocks) -> list[Tensor]:
    codes = _joined((b.codes & 15).unflatten(-1, (4, 2, 32)), -2, 4).flatten(2)
    return [*_pack_integers(b), codes]


def _pack_q5(b: SuperBlocks) -> list[Tensor]:
    *integers, codes = _pack_q4(b)
    return [*integers, _joined(b.codes.unflatten(-1, (8, 32)) >> 4, -2, 1), codes]


def _pack_integers(b: SuperBlocks) -> list[Tensor]:
    """Steps, scales and lows of Q4_K and Q5_K."""
    scales, lows = (t.byte().unflatten(-1, (2, 4)) for t in (b.scales, b.lows))  # (N, S, 2, 4)
    first = [t[..., 0, :] | (t[..., 1, :] >> 4) << 6 for t in (scales, lows)]
    rest = (scales[..., 1, :] & 15) | (lows[..., 1, :] & 15) << 4
    return [_half(b.step), _half(b.low_step), *first, rest]


def _pack_q6(b: SuperBlocks) -> list[Tensor]:
    low = _joined((b.codes & 15).unflatten(-1, (2, 2, 64)), -2, 4).flatten(2)
    high = _joined((b.codes >> 4).unflatten(-1, (2, 4, 32)), -2, 2).flatten(2)
    return [low, high, b.scales.to(torch.int8).view(torch.uint8), _half(b.step)]


def _unpack_q2(rows: Tensor) -> SuperBlocks:
    scales, low, step, low_step = rows.split([16, 64, 2, 2], -1)
    codes = _parted(low.unflatten(-1, (2, 32)), -2, 2).flatten(2)
    pair = _parted(scales, -1, 4).short()
    steps = _halves(step), _halves(low_step)
    return SuperBlocks("Q2_K", codes, steps[0], pair[..., 0], steps[1], pair[..., 1])


def _unpack_q3(rows: Tensor) -> SuperBlocks:
    high, low, nibbles, rest, step = rows.split([32, 64, 8, 4, 2], -1)
    codes = _parted(low.unflatten(-1, (2, 32)), -2, 2).flatten(2)
    codes |= _parted(high, -2, 1).flatten(2) << 2
    scales = _parted(nibbles, -2, 4).flatten(2) | _parted(rest, -2, 2).flatten(2) << 4
    scales = scales.short() - 32
    step = _halves(step)
    return SuperBlocks("Q3_K", codes, step, scales, step * 0, scales * 0)


def _unpack_q4(rows: Tensor) -> SuperBlocks:
    integers, codes = rows.split([16, 128], -1)
    codes = _parted(codes.unflatten(-1, (4, 32)), -2, 4).flatten(2)
    return SuperBlocks("Q4_K", codes, *_unpack_integers(integers))


def _unpack_q5(rows: Tensor) -> SuperBlocks:
    integers, high, codes = rows.split([16, 32, 128], -1)
    codes = _parted(codes.unflatten(-1, (4, 32)), -2, 4).flatten(2)
    codes |= _parted(high, -2, 1).flatten(2) << 4
    return SuperBlocks("Q5_K", codes, *_unpack_integers(integers))


def _unpack_integers(integers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Undo `_pack_integers`: (N, S, 16) to step, scales, low_step and lows."""
    step, low_step, *first, rest = integers.split([2, 2, 4, 4, 4], -1)
    last = (rest & 15, rest >> 4)
    scales, lows = (
        torch.cat([a & 63, b | (a >> 6) << 4], -1).short() for a, b in zip(first, last, strict=True)
    )
    return _halves(step), scales, _halves(low_step), lows


def _unpack_q6(rows: Tensor) -> SuperBlocks:
    low, high, scales, step = rows.split([128, 64, 16, 2], -1)
    codes = _parted(low.unflatten(-1, (2, 64)), -2, 4).flatten(2)
    codes |= _parted(high.unflatten(-1, (2, 32)), -2, 2).flatten(2) << 4
    scales, step = scales.contiguous().view(torch.int8).short(), _halves(step)
    return SuperBlocks("Q6_K", codes, step, scales, step * 0, scales * 0)


_LAYOUTS: dict[Kind, tuple[Callable[[SuperBlocks], list[Tensor]], Callable[[Tensor], SuperBlocks]]]
_LAYOUTS = {
    "Q2_K": (_pack_q2, _unpack_q2),
    "Q3_K": (_pack_q3, _unpack_q3),
    "Q4_K": (_pack_q4, _unpack_q4),
    "Q5_K": (_pack_q5, _unpack_q5),
    "Q6_K": (_pack_q6, _unpack_q6),
}
