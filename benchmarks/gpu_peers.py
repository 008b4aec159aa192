"""Other int4 kernels that may be installed, behind one function each.

A peer takes codes, scales and zero points of a weight and returns a function of x, or None where
it cannot run that shape. Those that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Product | None]


def tinygemm(codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype):
    """torch's own int4 kernel: bf16, groups of 32 to 256, N % 8 == 0 and K % 128 == 0."""
    N, K = codes.shape
    if dtype != torch.bfloat16 or group not in (32, 64, 128) or N % 8 or K % 128:
        return None
    nibbles = (codes[:, ::2] << 4) | codes[:, 1::2]  # uint8 (N, K/2)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), 8)
    offset = (8 - zero.float()) * scale.float()  # its weight is (code - 8) * scale + offset
    grid = torch.stack((scale.float(), offset), dim=-1).transpose(0, 1).contiguous().to(dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)


def gemlite(codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype):
    """gemlite's Triton kernels, with its default choice of launches."""
    from gemlite.core import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]

    N, K = codes.shape
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(
        4, group_size=group, in_features=K, out_features=N, input_dtype=kind, output_dtype=kind
    )
    layer.pack(codes, scale.to(dtype).view(-1, 1), zero.to(dtype).view(-1, 1), None)
    return layer


def marlin(codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype):
    """The original Marlin: fp16, symmetric, groups of 128 or rows."""
    import marlin as package  # pyright: ignore[reportMissingImports]

    N, K = codes.shape
    if dtype != torch.float16 or group not in (128, -1) or K % 128 or N % 256:
        return None
    dense = torch.nn.Linear(K, N, bias=False, dtype=dtype, device=codes.device)
    centred = codes.to(dtype).unflatten(1, (scale.shape[1], -1)) - zero.to(dtype).unsqueeze(-1)
    dense.weight.data = (centred * scale.to(dtype).unsqueeze(-1)).flatten(1)
    layer = package.Layer(K, N, groupsize=group).to(codes.device)
    layer.pack(dense.cpu(), scale.to(dtype).cpu())
    return layer.to(codes.device)


def present() -> dict[str, Maker]:
    """The peers that can be imported here."""
    found: dict[str, Maker] = {"tinygemm": tinygemm}
    for name, maker in (("gemlite", gemlite), ("marlin", marlin)):
        if importlib.util.find_spec(name) is not None:
            found[name] = maker
    return found
