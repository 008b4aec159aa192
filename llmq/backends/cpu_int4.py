"""int4 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.backends.base import TORCH, Layer


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
