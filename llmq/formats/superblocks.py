"""Super-blocks on disk, as GGUF has them. This layout is llmq's own; no other engine reads it.

Per matrix (N, K), S = K/256, under the name of its module:

    weight_packed   uint8 (N, S * bytes of a super-block)   rows of GGUF, see `formats.kquants`
    weight_shape    int64 (2,)                              N, K

The steps, fp16, are inside the bytes: no loader casts them to the dtype of the model. Of the
method that config.json states see `formats.codebook`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.errors import IntegrityError
from llmq.formats import parts
from llmq.formats.kquants import BYTES, WIDTH, from_bytes
from llmq.superblocks import KINDS, SuperBlockScheme, SuperBlockWeight, weight_of

FORMAT = "k-quants"
PACKED = "weight_packed"
SUFFIXES = (PACKED, "weight_shape")
DTYPES = {PACKED: torch.uint8, "weight_shape": torch.int64}


def shapes(scheme: SuperBlockScheme, N: int, K: int) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of every tensor of a matrix."""
    return {PACKED: (N, K // WIDTH * BYTES[KINDS[scheme.bits]]), "weight_shape": (2,)}


def write(name: str, q: SuperBlockWeight) -> dict[str, Tensor]:
    """The tensors of the module `name` ("" for bare keys), as they go into the file."""
    return {
        parts.key(name, PACKED): q.blocks().bytes(),
        parts.key(name, "weight_shape"): torch.tensor(q.shape, dtype=torch.int64),
    }


def checked(q: SuperBlockWeight) -> Tensor:
    """`weight_packed` of `q`, if unpacking it gives `q` again.

    Raises:
        IntegrityError: it does not.
    """
    packed = q.blocks().bytes()
    again = weight_of(from_bytes(KINDS[q.scheme.bits], packed))
    for name, tensor in vars(q).items():
        if isinstance(tensor, Tensor) and not torch.equal(tensor, getattr(again, name)):
            raise IntegrityError(f"{name} of a matrix in super-blocks changes when it is packed.")
    return packed


def read(name: str, tensors: Mapping[str, Tensor], scheme: SuperBlockScheme) -> SuperBlockWeight:
    """Undo `write`.

    Args:
        name: the module's name ("" for bare keys).
        tensors: a mapping that holds at least this module's tensors.
        scheme: what config.json says about this module.

    Raises:
        FormatError: a tensor is missing, or its shape or dtype contradicts the others.
    """
    N, K = (int(size) for size in parts.find(name, "weight_shape", tensors).tolist())
    parts.group_count(name, scheme, K)
    wanted = shapes(scheme, N, K)[PACKED]
    packed = parts.take(name, PACKED, tensors, wanted, DTYPES[PACKED])
    return unpack(scheme, (N, K), {PACKED: packed})


def unpack(
    scheme: SuperBlockScheme, shape: tuple[int, int], tensors: Mapping[str, Tensor | None]
) -> SuperBlockWeight:
    """The value behind tensors (by suffix) already known to fit `scheme` and `shape` (N, K)."""
    packed = tensors[PACKED]
    assert packed is not None
    return weight_of(from_bytes(KINDS[scheme.bits], packed))


def weights(scheme: SuperBlockScheme) -> dict[str, Any]:
    """What an entry of config_groups says beyond bits and groups."""
    return {"type": FORMAT, "kind": scheme.kind}


def parse(found: Mapping[str, Any], bits: int, group_size: int) -> SuperBlockScheme:
    """Undo `weights`.

    Raises:
        SchemeError: no such scheme.
    """
    return SuperBlockScheme(bits, group_size, bool(found.get("symmetric")), str(found.get("kind")))
