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

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.errors import BackendError
from llmq.formats.bits import unpack_bits
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq_kernels import layout, ops, selfcheck

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


@dataclass(frozen=True)
class CpuInt4:
    """torch's int4 CPU kernel for a few rows of bfloat16; `Torch` for more rows or other dtypes.

    The kernel computes (code - 8) * scale + offset in float32, with codes of 4 bits and scale
    and offset in bfloat16. Every width is mapped onto that form:

        2, 3 bits   codes are shifted per group so that the zero point is 8: offset 0, exact
        4 bits      offset = (8 - zero) * scale
        5, 6 bits   codes are shifted so that the zero point is 128, then as 8 bits
        8 bits      two 4-bit matrices side by side, code = 16 * high + low, times x beside x

    Only bfloat16 has a vectorised kernel (the float32 and float16 ones run at 0.4 GFLOP/s), and
    rounding float32 activations to bfloat16 behind the user's back would cost accuracy: those
    models are refused and take the dense path.
    """

    name: str = "cpu-int4"
    # The kernel is faster up to about 64 rows, with two matrices up to 16 (benchmarks/cpu_rows.py).
    # From 33 rows on, prompts get the very numbers of a dense layer instead.
    max_rows: int = 32
    max_rows_of_two: int = 16

    def why_not(self, layer: Layer) -> str | None:
        N, K, scheme = layer.out_features, layer.in_features, layer.scheme
        if layer.weight_packed.device.type != "cpu":
            return f"the weight is on {layer.weight_packed.device.type}, not on the CPU."
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "this CPU has neither AVX2 nor AVX512."
        if layer.weight_scale.dtype is not torch.bfloat16:
            return (
                f"the model is in {str(layer.weight_scale.dtype).removeprefix('torch.')} and the "
                "kernel computes in bfloat16; load it with dtype=torch.bfloat16."
            )
        if scheme.bits == 8 and not scheme.symmetric:
            return "8-bit zero points do not fit the kernel's bfloat16 offsets."
        if N % 16:
            return f"out_features={N} is not divisible by 16."
        if self._width(layer) is None:
            return f"in_features={K} is not divisible by 32."
        return None

    def prepare(self, layer: Layer) -> tuple[Tensor, ...]:
        q = layer.quantized()
        repeats = (layer.in_features // q.scale.shape[1]) // (self._width(layer) or 1)
        scale, zero = q.scale.float(), q.zero.float()
        codes, bits = q.codes.unflatten(1, (scale.shape[1], -1)), layer.scheme.bits  # (N, K/G, G)
        if bits < 4:
            codes = codes + 8 - q.zero.unsqueeze(-1)
            offset = torch.zeros_like(scale)
        else:
            offset = (8 - zero) * scale
        if bits > 4:
            codes = codes + 128 - q.zero.unsqueeze(-1)
            codes = torch.cat((codes >> 4, codes & 15), dim=1)
            scale, offset = torch.cat((16 * scale, scale), 1), torch.cat((0 * scale, 8 * scale), 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
        grid = torch.stack((scale.T, offset.T), dim=-1).repeat_interleave(repeats, dim=0)
        return packed, grid.bfloat16().contiguous()  # (N, K/2), (K/G, N, 2)

    def matmul(self, x: Tensor, layer: Layer) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        two = layer.scheme.bits > 4
        most = self.max_rows_of_two if two else self.max_rows
        if x.dtype is not torch.bfloat16 or rows.shape[0] > most:
            return TORCH.matmul(x, layer)
        if two:
            rows = torch.cat((rows, rows), dim=1)
        packed, grid = layer.prepared
        width = rows.shape[1] // grid.shape[0]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, width, grid)
        if layer.bias is not None:
            y += layer.bias
        return y.unflatten(0, x.shape[:-1])

    def _width(self, layer: Layer) -> int | None:
        """The kernel's group size: ours, or for whole rows the largest that divides K."""
        K = layer.in_features
        width = layer.scheme.group_width(K)
        return next((size for size in (128, 64, 32) if width % size == 0), None)


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

    def why_not(self, layer: Layer) -> str | None:
        device = layer.weight_packed.device
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


TORCH = Torch()
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
