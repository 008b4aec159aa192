"""Our own kernels on the GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.backends.base import Holder, Layer
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq_kernels import layout, ops, selfcheck


@dataclass(frozen=True)
class Triton(Holder):
    """The kernels of `llmq_kernels` (their README has layout and contract), for NVIDIA GPUs.

    bfloat16 and float16 activations; many rows are dequantized in slabs and multiplied densely.
    Codes of 5 and 6 bits are held in 8.

    Before the first layer of each format, `check` runs a tiny problem through the kernels: where
    they do not compile or do not compute what the reference does, `why_not` says so.
    """

    name: str = "triton"
    min_capability: tuple[int, int] = (8, 0)
    min_triton: tuple[int, int] = (3, 6)
    check: Callable[[torch.device, int, int, bool, torch.dtype], str | None] = selfcheck.failure

    def why_not_on(self, device: torch.device) -> str | None:
        """Why no kernel can run there, as a sentence; None if some can."""
        if device.type != "cuda":
            return f"the weight is on {device.type}, not on a CUDA GPU."
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA GPUs, and this torch is built for AMD ones."
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed."
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < self.min_triton:
            wanted = ".".join(map(str, self.min_triton))
            return f"triton {version} is installed; the kernels need {wanted} or newer."
        found = torch.cuda.get_device_capability(device)
        if found < self.min_capability:
            return (
                f"this GPU has compute capability {found[0]}.{found[1]}; the kernels need "
                f"{self.min_capability[0]}.{self.min_capability[1]} (Ampere) or newer."
            )
        return None

    def why_not(self, layer: Layer) -> str | None:
        device = layer.weight_packed.device
        if why := self.why_not_on(device):
            return why
        if layer.scheme.group_size not in layout.GROUP_SIZES:
            sizes = ", ".join(map(str, layout.GROUP_SIZES))
            return f"group_size={layer.scheme.group_size}: the kernels know {sizes}."
        if layer.weight_scale.dtype not in ops.FUSED_DTYPES:
            return (
                f"the model is in {str(layer.weight_scale.dtype).removeprefix('torch.')} and the "
                "kernels compute in bfloat16 or float16; load it with dtype=torch.bfloat16."
            )
        scheme, dtype = layer.scheme, layer.weight_scale.dtype
        return self.check(device, held_bits(scheme), scheme.group_size, scheme.symmetric, dtype)

    def why_not_stacked(self, layer: Layer) -> str | None:
        """`why_not` of stacked experts such as `layer`, for `stack` and `matmul_stacked`."""
        if layer.in_features % 8:
            return f"in_features={layer.in_features} is not divisible by 8."
        return self.why_not(layer)

    def stack(self, layers: Sequence[Layer]) -> layout.PackedWeight:
        """Experts of one shape and scheme, repacked for `matmul_stacked`; biases are left out."""
        return layout.stack([self._pack(layer) for layer in layers])

    def matmul_stacked(self, x: Tensor, stacked: layout.PackedWeight, chosen: Tensor) -> Tensor:
        """x (T, K), or (T * top_k, K), through the experts chosen (T, top_k): (T * top_k, N)."""
        return ops.linear_experts(x, stacked, chosen)

    def _pack(self, layer: Layer) -> layout.PackedWeight:
        q, scheme, bits = layer.quantized(), layer.scheme, held_bits(layer.scheme)
        zero = None if scheme.symmetric else q.zero
        codes = q.codes + _lift(scheme)
        return layout.pack(codes, q.scale, zero, bits=bits, group_size=scheme.group_size)

    def prepare(self, layer: Layer) -> tuple[Tensor, ...]:
        return tensors_of(self._pack(layer))

    def weight(self, layer: Layer) -> layout.PackedWeight:
        """What `prepare` made, as the kernels take it."""
        qweight, scale, counters, *zero = layer.prepared
        return layout.PackedWeight(
            qweight,
            scale,
            zero[0] if zero else None,
            counters,
            held_bits(layer.scheme),
            layer.scheme.group_size,
            (layer.out_features, layer.in_features),
        )

    def matmul(self, x: Tensor, layer: Layer) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return ops.linear(x, self.weight(layer), bias)

    def restore(self, layer: Layer) -> QuantizedWeight:
        codes, scale, zero = layout.unpack(self.weight(layer))
        if zero is None:
            zero = torch.full_like(scale, layer.scheme.middle, dtype=torch.uint8)
        return QuantizedWeight(layer.scheme, codes - _lift(layer.scheme), scale, zero)

    def dense(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(self.weight(layer), layer.weight_scale.dtype).to(dtype)


def held_bits(scheme: QuantScheme) -> int:
    """Bits of a code in the layout of the kernels."""
    return scheme.bits if scheme.bits in layout.BITS else 8


def _lift(scheme: QuantScheme) -> int:
    """What is added to codes, so that zero is where kernels think it is if it is not stored."""
    return 2 ** (held_bits(scheme) - 1) - scheme.middle if scheme.symmetric else 0


def tensors_of(weight: layout.PackedWeight) -> tuple[Tensor, ...]:
    """The tensors of a weight, as `Triton` keeps them in `layer.prepared`."""
    tensors = (weight.qweight, weight.scale, weight.counters)
    return tensors if weight.zero is None else (*tensors, weight.zero)
