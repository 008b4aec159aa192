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

from llmq.formats import parts
from llmq.scheme import QuantizedWeight, QuantScheme


def write(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of the embedding `name` ("" for bare keys), as they go into the file."""
    tensors = {"weight": _centred(q.codes), "weight_scale": q.scale.contiguous()}
    if not q.scheme.symmetric:
        tensors["weight_zero_point"] = _centred(q.zero)
    return {parts.key(name, suffix): tensor for suffix, tensor in tensors.items()}


def read(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """Undo `write`; see `compressed_tensors.read` for the arguments.

    Raises:
        FormatError: a tensor is missing or its shape or dtype contradicts the others.
    """
    codes = parts.take(name, "weight", tensors, None, torch.int8)
    N, K = codes.shape
    groups = (N, parts.group_count(name, scheme, K))
    scale = parts.take(name, "weight_scale", tensors, groups, parts.FLOATING)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = _plain(parts.take(name, "weight_zero_point", tensors, groups, torch.int8))
    return QuantizedWeight(scheme, _plain(codes), scale, zero)


def _centred(codes: Tensor) -> Tensor:
    """uint8 around 128 as int8 around 0."""
    return (codes ^ 128).view(torch.int8)


def _plain(codes: Tensor) -> Tensor:
    """Undo `_centred`."""
    return codes.view(torch.uint8) ^ 128
