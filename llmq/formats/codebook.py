"""Code books on disk. This layout is llmq's own; no other engine reads it.

Per matrix (N, K) in groups of G with c outliers per row, under the name of its module:

    weight_packed         int32 (N, ceil(K * bits / 32))   codes, packed along K
    weight_scale          bf16 | fp16 | fp32 (N, K/G)
    weight_shape          int64 (2,)                       N, K
    weight_book           as the scales (N, 2**bits)       "learned" only
    weight_outlier        as the scales (N, c)             where c > 0
    weight_outlier_index  int32 (N, c)                     their columns, where c > 0

config.json calls the method compressed-tensors, with a format and a type that the package of that
name does not know: whoever lacks llmq gets an error. A method of its own would be worse:
transformers fills the weights of a method that it does not know with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.codebook import CodebookScheme, CodebookWeight, nf4
from llmq.errors import FormatError, SchemeError
from llmq.formats import parts
from llmq.formats.bits import pack_bits, unpack_bits, words

FORMAT = "codebook"
OWN = ("weight_book", "weight_outlier", "weight_outlier_index")
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", *OWN)
DTYPES = {  # of those that are no floating point
    "weight_packed": torch.int32,
    "weight_shape": torch.int64,
    "weight_outlier_index": torch.int32,
}


def shapes(scheme: CodebookScheme, N: int, K: int) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of every tensor of a matrix."""
    count = scheme.kept(K)
    found: dict[str, tuple[int, ...]] = {
        "weight_packed": (N, words(K, scheme.bits)),
        "weight_scale": (N, K // scheme.group_width(K)),
        "weight_shape": (2,),
    }
    if scheme.book == "learned":
        found["weight_book"] = (N, 2**scheme.bits)
    if count:
        found |= {"weight_outlier": (N, count), "weight_outlier_index": (N, count)}
    return found


def write(name: str, q: CodebookWeight) -> dict[str, Tensor]:
    """The tensors of the module `name` ("" for bare keys), as they go into the file."""
    assert isinstance(q.scheme, CodebookScheme)
    everything = {
        "weight_packed": pack_bits(q.codes, q.scheme.bits),
        "weight_scale": q.scale.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        "weight_book": q.book.contiguous(),
        "weight_outlier": q.value.contiguous(),
        "weight_outlier_index": q.index.contiguous(),
    }
    return {parts.key(name, suffix): everything[suffix] for suffix in shapes(q.scheme, *q.shape)}


def read(name: str, tensors: Mapping[str, Tensor], scheme: CodebookScheme) -> CodebookWeight:
    """Undo `write`.

    Args:
        name: the module's name ("" for bare keys).
        tensors: a mapping that holds at least this module's tensors.
        scheme: what config.json says about this module.

    Raises:
        FormatError: a tensor is missing, or its shape, dtype or values contradict the others.
    """
    N, K = (int(size) for size in parts.find(name, "weight_shape", tensors).tolist())
    parts.group_count(name, scheme, K)
    found = {
        suffix: parts.take(name, suffix, tensors, shape, DTYPES.get(suffix, parts.FLOATING))
        for suffix, shape in shapes(scheme, N, K).items()
    }
    index = found.get("weight_outlier_index")
    if index is not None and not bool(((index >= 0) & (index < K)).all()):
        where = parts.key(name, "weight_outlier_index")
        raise FormatError(f"{where}: columns outside 0 to {K - 1}.")
    return unpack(scheme, (N, K), found)


def unpack(
    scheme: CodebookScheme, shape: tuple[int, int], tensors: Mapping[str, Tensor | None]
) -> CodebookWeight:
    """The value behind tensors (by suffix) already known to fit `scheme` and `shape` (N, K)."""
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    assert packed is not None
    assert scale is not None
    book, value, index = (tensors.get(suffix) for suffix in OWN)
    if index is None or value is None:
        value = scale.new_empty(shape[0], 0)
        index = packed.new_empty(shape[0], 0)
    return CodebookWeight(
        scheme,
        unpack_bits(packed, scheme.bits, shape[1]),
        scale,
        torch.full_like(scale, scheme.middle, dtype=torch.uint8),
        book=nf4(scale.device) if book is None else book,
        index=index,
        value=value,
    )


def weights(scheme: CodebookScheme) -> dict[str, Any]:
    """What an entry of config_groups says beyond bits and groups."""
    return {"type": FORMAT, "book": scheme.book, "outliers": scheme.outliers}


def parse(found: Mapping[str, Any], bits: int, group_size: int) -> CodebookScheme:
    """Undo `weights`.

    Raises:
        SchemeError: no such scheme.
    """
    book, outliers = found.get("book"), found.get("outliers", 0.0)
    if not isinstance(outliers, int | float):
        raise SchemeError(f"outliers={outliers!r}: not a number.")
    return CodebookScheme(bits, group_size, True, book=str(book), outliers=outliers)
