"""What a backend is, and the one that defines the others: dequantize, then multiply densely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.formats.bits import unpack_bits
from llmq.scheme import QuantizedWeight, QuantScheme

# Weights per slab of `dequantize`: its float32 work space stays in the last-level cache.
SLAB = 2**20


class Layer(Protocol):
    """What a backend sees of `nn.PackedLinear`; tensors as in `formats.compressed_tensors`."""

    scheme: QuantScheme
    in_features: int
    out_features: int
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    prepared: tuple[Tensor, ...]
    released: bool

    @property
    def holder(self) -> Holder: ...

    def quantized(self) -> QuantizedWeight: ...


class Backend(Protocol):
    """One way to multiply by a packed matrix."""

    @property
    def name(self) -> str: ...

    def why_not(self, layer: Layer) -> str | None:
        """None if this backend can run `layer`, else the sentence the user reads."""
        ...

    def prepare(self, layer: Layer) -> tuple[Tensor, ...]:
        """The tensors this backend wants to find in `layer.prepared`."""
        ...

    def matmul(self, x: Tensor, layer: Layer) -> Tensor:
        """x (..., K) times the transposed matrix, plus bias: (..., N) in x's dtype."""
        ...


class Holder:
    """A backend that needs nothing but `layer.prepared`: the layer's own tensors may go."""

    def restore(self, layer: Layer) -> QuantizedWeight:
        """The weight as it was before `prepare`, bit for bit, without its order."""
        raise NotImplementedError

    def dense(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) in `dtype`, as `dequantize` has it."""
        raise NotImplementedError


def dequantize(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in `dtype`: bit for bit `layer.quantized().dequantize(dtype)`, faster.

    The products are taken in float32 and rounded to the dtype of the scales; codes have at most
    8 bits and 16-bit scales at most 11, so that this is the one rounding of a 16-bit product.
    """
    if layer.released:
        return layer.holder.dense(layer, dtype)
    N, K = layer.out_features, layer.in_features
    bits, groups = layer.scheme.bits, layer.weight_scale.shape[1]
    scale = layer.weight_scale.float().unsqueeze(-1)  # (N, K/G, 1)
    if layer.weight_zero_point is None:
        zero = torch.full_like(scale, layer.scheme.middle)
    else:
        zero = unpack_bits(layer.weight_zero_point, bits, N, dim=0).float().unsqueeze(-1)

    def rows(first: int, last: int) -> Tensor:
        codes = unpack_bits(layer.weight_packed[first:last], bits, K)
        values = codes.float().unflatten(1, (groups, -1))  # (n, K/G, G)
        values = values.sub_(zero[first:last]).mul_(scale[first:last]).flatten(1)
        return values.to(layer.weight_scale.dtype).to(dtype)

    step = max(1, SLAB // K)
    # Under torch.compile the passes fuse into one loop, and slabs would only unroll it.
    if torch.compiler.is_compiling() or step >= N:
        return rows(0, N)
    weight = torch.empty(N, K, dtype=dtype, device=scale.device)
    for first in range(0, N, step):
        weight[first : first + step] = rows(first, first + step)
    return weight


@dataclass(frozen=True)
class Torch:
    """The definition: dequantize, then multiply densely. Every device, dtype and scheme."""

    name: str = "torch"

    def why_not(self, layer: Layer) -> str | None:
        return None

    def prepare(self, layer: Layer) -> tuple[Tensor, ...]:
        return ()

    def matmul(self, x: Tensor, layer: Layer) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, dequantize(layer, x.dtype), bias)


TORCH = Torch()
