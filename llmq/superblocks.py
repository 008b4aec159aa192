"""The super-blocks of llama.cpp ("K-quants") as a number format that solvers work in.

    W[n, k]  ~=  step * multiple * code - low_step * low      Q2_K, Q4_K, Q5_K
    W[n, k]  ~=  step * multiple * (code - middle)            Q3_K, Q6_K

256 weights of a row share the two steps, fp16; 32 (Q4_K, Q5_K) or 16 share the two integers.
`formats.kquants` has the layouts, and projects other codes into them. Who reads these weights:
llama.cpp after `llmq convert --format gguf`, and llmq, which has no kernel for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.errors import SchemeError
from llmq.formats.kquants import BYTES, GROUP, MIDDLE, WIDTH, Kind, SuperBlocks
from llmq.scheme import QuantizedWeight, QuantScheme

KINDS: dict[int, Kind] = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}  # bits -> kind
FIELDS = ("multiples", "low_step", "lows")


@dataclass(frozen=True)
class SuperBlockScheme(QuantScheme):
    """A kind of super-block; `SuperBlockScheme.of_bits` fills the fields in.

    Args:
        bits, group_size, symmetric: those of the kind.
        kind: "Q2_K" to "Q6_K".

    Raises:
        SchemeError: there is no such kind, or it has other bits or groups.
    """

    group_size: int = 32
    kind: str = "Q4_K"

    def __post_init__(self) -> None:
        if self.kind != KINDS.get(self.bits):
            fits = ", ".join(f"{kind} has {bits}" for bits, kind in KINDS.items())
            raise SchemeError(f"bits={self.bits}: no K-quant of {self.kind!r} ({fits}).")
        own = (GROUP[KINDS[self.bits]], self.kind in MIDDLE)
        if (self.group_size, self.symmetric) != own:
            raise SchemeError(f"{self.kind} has groups of {own[0]}, symmetric={own[1]}.")

    @classmethod
    def of_bits(cls, bits: int) -> SuperBlockScheme:
        """The one with 2, 3, 4, 5 or 6 bits per code.

        Raises:
            SchemeError: other bits.
        """
        if bits not in KINDS:
            raise SchemeError(f"bits={bits}: K-quants have {', '.join(map(str, KINDS))} bits.")
        kind = KINDS[bits]
        return cls(bits, GROUP[kind], kind in MIDDLE, kind)

    def divides(self, in_features: int) -> bool:
        return in_features % WIDTH == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        return BYTES[KINDS[self.bits]] * 8 / WIDTH


@dataclass(frozen=True)
class SuperBlockWeight(QuantizedWeight):
    """One matrix (N, K) in S = K/256 super-blocks per row. `zero` (N, S) says nothing.

    Attributes:
        scale: fp16 (N, S), step above.
        multiples: int16 (N, K/G), multiple above; negative in Q3_K and Q6_K only.
        low_step: fp16 (N, S); 0 in Q3_K and Q6_K.
        lows: int16 (N, K/G), low above; 0 in Q3_K and Q6_K.
    """

    # Defaults only because those of the base have some.
    multiples: Tensor = None  # type: ignore[assignment]
    low_step: Tensor = None  # type: ignore[assignment]
    lows: Tensor = None  # type: ignore[assignment]

    def rows(self, rows: slice | Tensor) -> SuperBlockWeight:
        base = super().rows(rows)
        assert isinstance(base, SuperBlockWeight)
        return replace(base, **{name: getattr(self, name)[rows] for name in FIELDS})

    def blocks(self) -> SuperBlocks:
        """The same as the format has it."""
        S = self.scale.shape[1]
        return SuperBlocks(
            KINDS[self.scheme.bits],
            self.codes.unflatten(1, (S, -1)),
            self.scale.unsqueeze(-1),
            self.multiples.unflatten(1, (S, -1)),
            self.low_step.unsqueeze(-1),
            self.lows.unflatten(1, (S, -1)),
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (N, K) in `dtype` (default: float32, as readers of the format compute it)."""
        weight = self.codes.new_empty(self.shape, dtype=dtype or torch.float32)
        for rows in self.slices(1 << 20):
            weight[rows] = self.rows(rows).blocks().weight()
        return weight


def weight_of(blocks: SuperBlocks) -> SuperBlockWeight:
    """Undo `SuperBlockWeight.blocks`."""
    scheme = next(s for s in map(SuperBlockScheme.of_bits, KINDS) if s.kind == blocks.kind)
    step, low_step = blocks.step.squeeze(-1), blocks.low_step.squeeze(-1)
    return SuperBlockWeight(
        scheme,
        blocks.codes.flatten(1),
        step,
        torch.full_like(step, scheme.middle, dtype=torch.uint8),
        multiples=blocks.scales.flatten(1),
        low_step=low_step,
        lows=blocks.lows.flatten(1),
    )
