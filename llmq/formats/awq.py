"""AWQ, version "gemm": the layout of AutoAWQ. 4 bits only.

Per matrix (N, K) in groups of G, under the name of its module:

    qweight   int32 (K, N / 8)     codes, packed along N
    qzeros    int32 (K/G, N / 8)   zeros, packed along N
    scales    fp16 (K/G, N)

Eight neighbours share a word, interleaved: its nibbles, from the lowest, hold the items
0, 2, 4, 6, 1, 3, 5, 7. A symmetric matrix is one whose zeros are all 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmq.errors import FormatError, SchemeError
from llmq.formats import columns, parts
from llmq.formats.bits import pack_bits, unpack_bits
from llmq.formats.compressed_tensors import CheckpointConfig
from llmq.scheme import QuantizedWeight, QuantScheme

METHOD = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")
ITEMS = (0, 2, 4, 6, 1, 3, 5, 7)  # in a word, from the lowest nibble
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the items: the inverse of ITEMS


def why_not(scheme: QuantScheme, N: int, K: int) -> str | None:
    """None if this layout holds a matrix (N, K) in `scheme`, else the reason."""
    if scheme.bits != 4:
        return f"AWQ holds 4 bits, not {scheme.bits}"
    if N % 8:
        return f"out_features={N} is not divisible by 8"
    return None


def _pack(items: Tensor) -> Tensor:
    """(.., N) -> int32 (.., N/8)."""
    return pack_bits(items.unflatten(1, (-1, 8))[..., ITEMS].flatten(1), 4)


def _unpack(packed: Tensor) -> Tensor:
    """Undo `_pack`: uint8."""
    items = unpack_bits(packed, 4, packed.shape[1] * 8)
    return items.unflatten(1, (-1, 8))[..., PLACES].flatten(1)


def write(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of the module `name` ("" for bare keys), as they go into the file.

    Scales are rounded to fp16 (see `columns.half_scales`).

    Raises:
        SchemeError: this layout cannot hold `q`.
    """
    reason = why_not(q.scheme, *q.shape)
    if q.order is not None:
        reason = "its inputs are ordered by importance, which AWQ has no place for"
    if reason:
        raise SchemeError(f"{name or 'weight'}: {reason}.")
    return {
        parts.key(name, "qweight"): _pack(q.codes.T),
        parts.key(name, "qzeros"): _pack(q.zero.T),
        parts.key(name, "scales"): columns.half_scales(q).T.contiguous(),
    }


def shape(name: str, shapes: Mapping[str, Sequence[int]], scheme: QuantScheme) -> tuple[int, int]:
    """(N, K) of the module `name` from the `shapes` of its tensors.

    Raises:
        FormatError: its qweight is missing or no matrix.
    """
    K, columns_ = columns.matrix_shape(name, shapes)
    return columns_ * 32 // scheme.bits, K


def read_zeros(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor:
    """Zeros of the module `name`, uint8 (N, K/G).

    Raises:
        FormatError: qzeros is missing or of another shape than qweight and `scheme` say.
    """
    N, K = shape(name, columns.shapes_of(name, tensors), scheme)
    groups = parts.group_count(name, scheme, K)
    return _unpack(parts.take(name, "qzeros", tensors, (groups, N // 8))).T


def read(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """Undo `write`.

    Args:
        name: the module's name ("" for bare keys).
        tensors: a mapping that holds at least this module's tensors.
        scheme: what config.json says about this module; symmetric if its zeros are.

    Raises:
        FormatError: a tensor is missing or contradicts the others.
    """
    N, K = shape(name, columns.shapes_of(name, tensors), scheme)
    zero = read_zeros(name, tensors, scheme)
    packed = parts.take(name, "qweight", tensors, (K, N // 8))
    scale = parts.take(name, "scales", tensors, (zero.shape[1], N), parts.FLOATING).T
    columns.check_symmetric(name, zero, scheme)
    codes = _unpack(packed).T
    return QuantizedWeight(scheme, codes.contiguous(), scale.contiguous(), zero.contiguous())


def config(schemes: Mapping[str, QuantScheme], dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        schemes: module -> its scheme, one for all.
        dense: matrices in full precision, but for embeddings and the output layer.

    Raises:
        SchemeError: several group sizes, or the name of a dense matrix is part of the name of a
            quantized one: AWQ's readers go by substrings.
    """
    sizes = sorted({scheme.group_size for scheme in schemes.values()})
    if len(sizes) > 1:
        raise SchemeError(f"AWQ holds one group size, not {sizes}.")
    skipped = [*dense, *([] if "lm_head" in schemes else ["lm_head"])]
    for name in skipped:
        if clash := next((other for other in schemes if name in other), None):
            raise SchemeError(f"AWQ would take {clash} for {name}, which is not quantized.")
    return {
        "quant_method": METHOD,
        "version": "gemm",
        "bits": 4,
        "group_size": sizes[0],
        "zero_point": True,
        "modules_to_not_convert": skipped,
        **({"lm_head": True} if "lm_head" in schemes else {}),
    }


def parse_config(quantization_config: Mapping[str, Any]) -> CheckpointConfig:
    """Read a `quantization_config`. Whether zeros are symmetric is a matter of the files.

    Which modules are quantized is seen from the files too, so `ignore` stays empty.

    Raises:
        FormatError: it is not AWQ's "gemm" layout in a group size that `QuantScheme` holds.
    """
    columns.check_method(quantization_config, METHOD)
    found = quantization_config.get("version") or quantization_config.get("checkpoint_format")
    if str(found or "gemm").lower() != "gemm":
        raise FormatError(f"version={found!r}: llmq reads AWQ checkpoints of version 'gemm'.")
    if quantization_config.get("zero_point", True) is not True:
        raise FormatError("zero_point=false: AWQ's 'gemm' layout has zero points.")
    bits, group_size = (quantization_config.get(key) for key in ("bits", "group_size"))
    scheme = columns.parse_scheme(bits, group_size)
    if scheme.bits != 4:
        raise FormatError(f"bits={bits}: AWQ's 'gemm' layout has 4.")
    return CheckpointConfig(((scheme, ("Linear",)),), ())
