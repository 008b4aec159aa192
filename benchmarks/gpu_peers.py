"""Other int4 kernels that may be installed, behind one function each.

A peer takes codes, scales and zero points of a weight and returns a function of x, or None where
it cannot run that shape. Those that are not installed are left out. The calls of gemlite
0.6.0.post2, humming 0.1.19 and torchao 0.18.0 were written from those packages' sources and have
not been run on a GPU yet; a peer that fails leaves a row that says so.
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
    """gemlite's Triton kernels, with its default choice of launches; groups."""
    from gemlite.core import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]

    N, K = codes.shape
    if group == -1:
        return None
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
    layer = package.Layer(K, N, groupsize=group).to(codes.device)
    layer.pack(_linear(codes, scale, zero, dtype).cpu(), scale.to(dtype).cpu())
    return layer.to(codes.device)


def humming(codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype):
    """Humming's layer (0.1.19), which quantizes the dense matrix itself: symmetric."""
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

    N, K = codes.shape
    config = {"dtype": "int4"} | ({} if group == -1 else {"group_size": group})
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=config, torch_dtype=dtype)
    layer = layer.to(codes.device)
    layer.load_from_unquantized(_linear(codes, scale, zero, dtype).weight.data)
    layer.transform()
    return layer


def torchao(codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype):
    """torchao's int4 tensors (0.18): tinygemm's kernel, as torchao's users call it; bf16."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        quantize_,
    )

    if dtype != torch.bfloat16 or group not in (32, 64, 128):
        return None
    layer = torch.nn.Sequential(_linear(codes, scale, zero, dtype))
    config = Int4WeightOnlyConfig(
        group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    quantize_(layer, config)
    return layer


def _linear(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> torch.nn.Linear:
    """The dense layer, for peers that quantize it themselves."""
    N, K = codes.shape
    with torch.device("meta"):
        dense = torch.nn.Linear(K, N, bias=False, dtype=dtype)
    centred = codes.to(dtype).unflatten(1, (scale.shape[1], -1)) - zero.to(dtype).unsqueeze(-1)
    weight = (centred * scale.to(dtype).unsqueeze(-1)).flatten(1)
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    return dense


def present() -> dict[str, Maker]:
    """The peers that can be imported here."""
    found: dict[str, Maker] = {"tinygemm": tinygemm}
    makers = {"gemlite": gemlite, "marlin": marlin, "humming": humming, "torchao": torchao}
    for name, maker in makers.items():
        if importlib.util.find_spec(name) is not None:
            found[name] = maker
    return found
