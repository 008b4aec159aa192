"""compressed-tensors `int-quantized`: input embeddings of 8 bits, one byte per weight.

Per table (N, K) in groups of G, under the name of its module:

    weight             int8 (N, K)                     code - 128
    weight_scale       bf16 | fp16 | fp32 (N, K/G)
    weight_zero_point  int8 (N, K/G)                   zero - 128; asymmetric only

Not `pack-quantized` as for linear layers: transformers 5.17 to 5.23 with compressed-tensors 0.20
cannot load an embedding in that layout. Initialising the model reads the `weight` of every
nn.Embedding, which compressed-tensors has taken away by then. Here there is one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.scheme import QuantizedWeight, QuantScheme


def write(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of the embedding `name` ("" for bare keys), as they go into the file."""
    prefix = f"{name}." if name else ""
    tensors = {
        f"{prefix}weight": _centred(q.codes),
        f"{prefix}weight_scale": q.scale.contiguous(),
    }
    if not q.scheme.symmetric:
        tensors[f"{prefix}weight_zero_point"] = _centred(q.zero)
    return tensors


def read(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """Undo `write`; see `compressed_tensors.read` for the arguments.

    Raises:
        FormatError: a tensor is missing or its shape or dtype contradicts the others.
    """
    prefix = f"{name}." if name else ""

    def get(suffix: str, shape: tuple[int, int] | None = None) -> Tensor:
        found = tensors.get(f"{prefix}{suffix}")
        if found is None:
            raise FormatError(f"{prefix}{suffix} is missing: the checkpoint is incomplete.")
        right = found.is_floating_point() if suffix == "weight_scale" else found.dtype == torch.int8
        if not right or (shape is not None and tuple(found.shape) != shape):
            raise FormatError(
                f"{prefix}{suffix} is {found.dtype} {tuple(found.shape)}, which does not fit "
                f"{shape or 'int8'} for {scheme}."
            )
        return found

    codes = get("weight")
    N, K = codes.shape
    groups = (N, K // scheme.group_width(K))
    scale = get("weight_scale", groups)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = _plain(get("weight_zero_point", groups))
    return QuantizedWeight(scheme, _plain(codes), scale, zero)


def _centred(codes: Tensor) -> Tensor:
    """uint8 around 128 as int8 around 0."""
    return (codes ^ 128).view(torch.int8)


def _plain(codes: Tensor) -> Tensor:
    """Undo `_centred`."""
    return codes.view(torch.uint8) ^ 128
