"""How a packed matrix is multiplied: an ordered tuple of backends, one chosen per layer at load.

    BACKENDS    in order of preference; the last, `TORCH`, runs everything everywhere
    choose      the first backend that can run a layer, or the one the user named
    why_plain   why a layer was left to `TORCH`
    dequantize  the dense matrix, in cache-sized slabs

A backend may keep tensors of its own (a repacked weight) in `layer.prepared`: made once, in
`prepare`, from the tensors of the checkpoint. Those stay as they are, unless the backend is a
`Holder`: then they are made again from its own when somebody asks for them.
"""

from __future__ import annotations

from llmq.backends.base import TORCH, Backend, Holder, Layer, dequantize
from llmq.backends.cpu_int4 import CpuInt4
from llmq.backends.triton import Triton, tensors_of
from llmq.errors import BackendError

__all__ = [
    "BACKENDS",
    "CPU_INT4",
    "TORCH",
    "TRITON",
    "Backend",
    "CpuInt4",
    "Holder",
    "Layer",
    "Triton",
    "choose",
    "dequantize",
    "tensors_of",
    "why_plain",
]

CPU_INT4 = CpuInt4()
TRITON = Triton()
BACKENDS: tuple[Backend, ...] = (TRITON, CPU_INT4, TORCH)


def choose(layer: Layer, name: str | None = None, among: tuple[Backend, ...] = BACKENDS) -> Backend:
    """The first backend of `among` that can run `layer`, or the one called `name`.

    Raises:
        BackendError: `name` is unknown or cannot run this layer.
    """
    if name is None:
        return next(backend for backend in among if backend.why_not(layer) is None)
    named = {backend.name: backend for backend in among}
    if name not in named:
        raise BackendError(f"backend={name!r}: use one of {', '.join(named)}.")
    if reason := named[name].why_not(layer):
        raise BackendError(f"backend={name!r}: {reason}")
    return named[name]


def why_plain(layer: Layer, among: tuple[Backend, ...] = BACKENDS) -> str:
    """What the faster backend for this layer's device has against it."""
    on_gpu = layer.weight_packed.device.type == "cuda"
    fast = next(b for b in among if (b.name == TRITON.name) == on_gpu)
    return fast.why_not(layer) or ""
