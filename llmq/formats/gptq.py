"""GPTQ: the layout that AutoGPTQ and GPTQModel write.

Per matrix (N, K) in groups of G, under the name of its module:

    qweight   int32 (K * bits / 32, N)     codes, packed along K
    qzeros    int32 (K/G, N * bits / 32)   zeros, packed along N
    scales    fp16 (K/G, N)
    g_idx     int32 (K,)                   the group of every input

Packing is the bit stream of `bits`. Version 2 stores zeros as they are. Version 1
stores zero - 1, and 0 as the largest code; some readers add the 1 back without masking and get
2**bits, so that version 1 is written for symmetric schemes only.

With `desc_act` inputs were sorted by importance before they were cut into groups, and g_idx says
where each one went. If whole groups moved, their scales are moved back. Else the columns are
sorted by group, and `QuantizedWeight.order` says which input each of them reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError, SchemeError
from llmq.formats import columns, parts
from llmq.formats.bits import pack_bits, unpack_bits, words
from llmq.formats.compressed_tensors import CheckpointConfig
from llmq.scheme import QuantizedWeight, QuantScheme

METHOD = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)  # other widths are cut into bit planes, in layouts of their own


def why_not(scheme: QuantScheme, N: int, K: int) -> str | None:
    """None if this layout holds a matrix (N, K) in `scheme`, else the reason."""
    if scheme.bits not in BITS:
        return f"GPTQ layouts hold {', '.join(map(str, BITS))} bits, not {scheme.bits}"
    if any(size * scheme.bits % 32 for size in (N, K)):
        return f"{N} x {K} codes of {scheme.bits} bits do not fill whole words of 32 bits"
    return None


def write(name: str, q: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """The tensors of the module `name` ("" for bare keys), as they go into the file.

    Scales are rounded to fp16 (see `columns.half_scales`).

    Args:
        name: the module's name.
        q: the value.
        version: 1 (what all readers know; symmetric only) or 2.

    Raises:
        SchemeError: this layout, or this version of it, cannot hold `q`.
    """
    scheme, (N, K) = q.scheme, q.shape
    if reason := why_not(scheme, N, K):
        raise SchemeError(f"{name or 'weight'}: {reason}.")
    if version == 1 and not scheme.symmetric:
        raise SchemeError(
            f"{name or 'weight'}: readers of version 1 disagree about zero points of 0. "
            "Write version 2."
        )
    codes, groups = q.codes, torch.arange(K) // scheme.group_width(K)
    if q.order is not None:
        back = q.order.argsort()
        codes, groups = codes[:, back], groups.to(back.device)[back]
    zero = (q.zero.to(torch.int16) - (2 - version)) & scheme.qmax
    tensors = {
        "qweight": pack_bits(codes.T, scheme.bits, dim=0),
        "qzeros": pack_bits(zero.T, scheme.bits, dim=1),
        "scales": columns.half_scales(q).T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }
    return {parts.key(name, suffix): tensor for suffix, tensor in tensors.items()}


def shape(name: str, shapes: Mapping[str, Sequence[int]], scheme: QuantScheme) -> tuple[int, int]:
    """(N, K) of the module `name` from the `shapes` of its tensors.

    Raises:
        FormatError: its qweight is missing or no matrix.
    """
    rows, N = columns.matrix_shape(name, shapes)
    return N, rows * 32 // scheme.bits


def read_zeros(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, version: int = 1
) -> Tensor:
    """Zeros of the module `name`, uint8 (N, K/G), groups in the file's order.

    Raises:
        FormatError: qzeros is missing or of another shape than qweight and `scheme` say.
    """
    N, K = shape(name, columns.shapes_of(name, tensors), scheme)
    groups = parts.group_count(name, scheme, K)
    packed = parts.take(name, "qzeros", tensors, (groups, words(N, scheme.bits)))
    zero = unpack_bits(packed, scheme.bits, N, dim=1).T
    return (zero + (2 - version)) & scheme.qmax


def read(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, version: int = 1
) -> QuantizedWeight:
    """Undo `write`.

    Args:
        name: the module's name ("" for bare keys).
        tensors: a mapping that holds at least this module's tensors; g_idx may be missing.
        scheme: what config.json says about this module; symmetric if its zeros are.
        version: see `version_of`.

    Raises:
        FormatError: a tensor is missing or contradicts the others.
    """
    N, K = shape(name, columns.shapes_of(name, tensors), scheme)
    zero = read_zeros(name, tensors, scheme, version)
    packed = parts.take(name, "qweight", tensors, (words(K, scheme.bits), N))
    scale = parts.take(name, "scales", tensors, (zero.shape[1], N), parts.FLOATING).T
    columns.check_symmetric(name, zero, scheme)
    codes = unpack_bits(packed, scheme.bits, K, dim=0).T
    order = None
    if parts.key(name, "g_idx") in tensors:
        g_idx = parts.take(name, "g_idx", tensors, (K,)).long()
        if is_ordered(name, g_idx, scheme):
            order = g_idx.argsort(stable=True)
            codes = codes[:, order]
        else:
            chosen = g_idx[:: scheme.group_width(K)]
            scale, zero = scale[:, chosen], zero[:, chosen]
    return QuantizedWeight(scheme, codes.contiguous(), scale.contiguous(), zero.contiguous(), order)


def is_ordered(name: str, g_idx: Tensor, scheme: QuantScheme) -> bool:
    """Whether inputs of one group are scattered, so that their order must be kept.

    Args:
        name: the module's name, for errors.
        g_idx: integers (K,), the group of every input.
        scheme: the number format.

    Raises:
        FormatError: a group that does not exist, or groups of different sizes.
    """
    width = scheme.group_width(len(g_idx))
    blocks = g_idx.view(-1, width)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= len(blocks):
        raise FormatError(
            f"{parts.key(name, 'g_idx')} names groups {int(g_idx.min())} to "
            f"{int(g_idx.max())}, but there are {len(blocks)}."
        )
    if bool((blocks == blocks[:, :1]).all()):
        return False
    if not bool((torch.bincount(g_idx, minlength=len(blocks)) == width).all()):
        raise FormatError(
            f"{parts.key(name, 'g_idx')}: groups of different sizes; {scheme} means {width} "
            "inputs in each."
        )
    return True


def config(
    schemes: Mapping[str, QuantScheme], dense: Sequence[str], version: int = 1
) -> dict[str, Any]:
    """The `quantization_config` of config.json; also the content of quantize_config.json.

    Args:
        schemes: module -> its scheme. What most have is written once, the others by name.
        dense: matrices in full precision, but for embeddings and the output layer.
        version: as in `write`.
    """
    most = columns.most_common(schemes)
    others = {
        name: {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric}
        for name, s in schemes.items()
        if s != most
    }
    skipped = {
        f"-:{columns.pattern(name)}": {} for name in columns.with_fused(dict.fromkeys(dense))
    }
    changed = {f"+:{columns.pattern(n)}": value for n, value in columns.with_fused(others).items()}
    return {
        "quant_method": METHOD,
        "bits": most.bits,
        "group_size": most.group_size,
        "desc_act": False,
        "sym": most.symmetric,
        "lm_head": "lm_head" in schemes,
        "true_sequential": True,
        "checkpoint_format": next(text for text, number in _VERSIONS.items() if number == version),
        "pack_dtype": "int32",
        "dynamic": skipped | changed,
    }


def version_of(quantization_config: Mapping[str, Any]) -> int:
    """1 or 2: what the file's zeros mean.

    Raises:
        FormatError: another layout than GPTQ's own.
    """
    text = quantization_config.get("checkpoint_format") or "gptq"
    if text not in _VERSIONS:
        raise FormatError(f"checkpoint_format={text!r}: llmq reads {' and '.join(_VERSIONS)}.")
    return _VERSIONS[text]


def parse_config(quantization_config: Mapping[str, Any]) -> CheckpointConfig:
    """Read a `quantization_config`. Whether zeros are symmetric is a matter of the files.

    Which modules are quantized is seen from the files too, so `ignore` stays empty.

    Raises:
        FormatError: it is not a GPTQ layout in a width and group size that `QuantScheme` holds.
    """
    columns.check_method(quantization_config, METHOD)
    version_of(quantization_config)
    if (dtype := quantization_config.get("pack_dtype") or "int32") != "int32":
        raise FormatError(f"pack_dtype={dtype!r}: llmq reads int32.")
    bits, group_size = (quantization_config.get(key) for key in ("bits", "group_size"))
    groups = []
    for target, changes in (quantization_config.get("dynamic") or {}).items():
        if target.startswith("-:") or not changes:
            continue
        scheme = _scheme(changes.get("bits", bits), changes.get("group_size", group_size))
        groups.append((scheme, (f"re:{target.removeprefix('+:')}",)))
    groups.append((_scheme(bits, group_size), ("Linear",)))
    return CheckpointConfig(tuple(groups), ())


def _scheme(bits: Any, group_size: Any) -> QuantScheme:
    scheme = columns.parse_scheme(bits, group_size)
    if scheme.bits not in BITS:
        raise FormatError(f"bits={bits}: llmq reads {', '.join(map(str, BITS))} in GPTQ layouts.")
    return scheme
