"""How a packed matrix is multiplied: an ordered tuple of backends, one chosen per layer at load.

    BACKENDS   fastest first; the last one, `TORCH`, runs everything everywhere
    choose     the first backend that can run a layer, or the one the user named

A backend may keep tensors of its own (a repacked weight) in `layer.prepared`: made once, in
`prepare`, from the tensors of the checkpoint, which stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from llmq.errors import BackendError
from llmq.scheme import QuantizedWeight, QuantScheme


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


@dataclass(frozen=True)
class TorchBackend:
    """The definition: dequantize, then multiply densely. Every device, dtype and scheme."""

    name: str = "torch"

    def why_not(self, layer: Layer) -> str | None:
        return None

    def prepare(self, layer: Layer) -> tuple[Tensor, ...]:
        return ()

    def matmul(self, x: Tensor, layer: Layer) -> Tensor:
        return F.linear(x, layer.quantized().dequantize(x.dtype), layer.bias)


TORCH = TorchBackend()
BACKENDS: tuple[Backend, ...] = (TORCH,)


def choose(layer: Layer, name: str | None = None) -> Backend:
    """The first backend of `BACKENDS` that can run `layer`, or the one called `name`.

    Raises:
        BackendError: `name` is unknown or cannot run this layer.
    """
    if name is None:
        return next(backend for backend in BACKENDS if backend.why_not(layer) is None)
    named = {backend.name: backend for backend in BACKENDS}
    if name not in named:
        raise BackendError(f"backend={name!r}: use one of {', '.join(named)}.")
    if reason := named[name].why_not(layer):
        raise BackendError(f"backend={name!r}: {reason}")
    return named[name]
