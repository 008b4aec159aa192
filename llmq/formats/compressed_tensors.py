"""compressed-tensors `pack-quantized`: the default layout on disk, and the run-time layout of `nn`.

Per matrix (N, K) in groups of G, under the name of its module:

    weight_packed      int32 (N, ceil(K * bits / 32))    codes, packed along K
    weight_scale       bf16 | fp16 | fp32 (N, K/G)
    weight_zero_point  int32 (ceil(N * bits / 32), K/G)  zeros, packed along N; asymmetric only
    weight_shape       int64 (2,)                        N, K

Packing is the bit stream of `bits`.

Input embeddings have a layout of their own, `bytewise`, and so have code books, `codebook`, and
super-blocks, `superblocks`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.codebook import CodebookScheme
from llmq.errors import FormatError, SchemeError
from llmq.formats import codebook, parts, superblocks
from llmq.formats.bits import pack_bits, unpack_bits, words
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.superblocks import SuperBlockScheme

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BYTEWISE = "int-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def write(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of the module `name` ("" for bare keys), as they go into the file.

    Raises:
        SchemeError: the columns of `q` have an order, which this layout has no place for, or it
            is in a code book or in super-blocks.
    """
    if isinstance(q.scheme, SuperBlockScheme):
        raise SchemeError(f"{name or 'weight'}: in super-blocks, which {FORMAT} does not hold.")
    if isinstance(q.scheme, CodebookScheme):
        raise SchemeError(f"{name or 'weight'}: in a code book, which {FORMAT} does not hold.")
    if q.order is not None:
        raise SchemeError(
            f"{name or 'weight'}: its inputs are ordered by importance, which compressed-tensors "
            "has no place for."
        )
    bits = q.scheme.bits
    tensors = {
        "weight_packed": pack_bits(q.codes, bits),
        "weight_scale": q.scale.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not q.scheme.symmetric:
        tensors["weight_zero_point"] = pack_bits(q.zero, bits, dim=0)
    return {parts.key(name, suffix): tensor for suffix, tensor in tensors.items()}


def read(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """Undo `write`.

    Args:
        name: the module's name ("" for bare keys).
        tensors: a mapping that holds at least this module's tensors.
        scheme: what config.json says about this module.

    Raises:
        FormatError: a tensor is missing or its shape or dtype contradicts the others.
    """
    N, K = (int(size) for size in parts.find(name, "weight_shape", tensors).tolist())
    groups = parts.group_count(name, scheme, K)
    packed = parts.take(name, "weight_packed", tensors, (N, words(K, scheme.bits)))
    scale = parts.take(name, "weight_scale", tensors, (N, groups), parts.FLOATING)
    zero = None
    if not scheme.symmetric:
        zero = parts.take(name, "weight_zero_point", tensors, (words(N, scheme.bits), groups))
    return unpack(scheme, (N, K), packed, scale, zero)


def unpack(
    scheme: QuantScheme,
    shape: tuple[int, int],
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
) -> QuantizedWeight:
    """The value behind tensors already known to fit `scheme` and `shape` (N, K)."""
    N, K = shape
    codes = unpack_bits(packed, scheme.bits, K)
    if zero_point is None:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = unpack_bits(zero_point, scheme.bits, N, dim=0)
    return QuantizedWeight(scheme, codes, scale, zero)


def config(
    groups: Mapping[QuantScheme, Sequence[str]],
    ignore: Sequence[str],
    embeddings: Mapping[QuantScheme, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        groups: scheme -> its targets: "Linear" (every Linear), exact module names, or "re:" and
            a regular expression that must match from the start of the module's name.
        ignore: modules in full precision, written the same way.
        embeddings: the same as `groups` for what is stored with one byte per weight.
    """
    layouts = [(_layout(group[0]), *group) for group in groups.items()]
    layouts += [(BYTEWISE, *group) for group in (embeddings or {}).items()]
    return {
        "quant_method": METHOD,
        "format": layouts[0][0],
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": list(targets),
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": layout,
            }
            for i, (layout, scheme, targets) in enumerate(layouts)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _layout(scheme: QuantScheme) -> str:
    if isinstance(scheme, SuperBlockScheme):
        return superblocks.FORMAT
    return codebook.FORMAT if isinstance(scheme, CodebookScheme) else FORMAT


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    per_row = scheme.group_size == -1
    own = codebook.weights(scheme) if isinstance(scheme, CodebookScheme) else {}
    if isinstance(scheme, SuperBlockScheme):
        own = superblocks.weights(scheme)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else scheme.group_size,
        "dynamic": False,
        **own,
    }


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint's `quantization_config` says, reduced to what llmq needs.

    Attributes:
        groups: (scheme, targets) in the file's order.
        ignore: exact names, "re:..." patterns or class names kept in full precision.
        embeddings: exact names of what is stored with one byte per weight -> scheme.
    """

    groups: tuple[tuple[QuantScheme, tuple[str, ...]], ...]
    ignore: tuple[str, ...]
    embeddings: Mapping[str, QuantScheme] = field(default_factory=dict)

    def scheme_for(self, name: str, kind: str = "Linear") -> QuantScheme | None:
        """The scheme of the module `name` of class `kind`; None = full precision.

        An exact name beats a pattern, and a pattern beats the class name.
        """
        if any(_names(entry, name) or entry == kind for entry in self.ignore):
            return None
        targets = [(target, scheme) for scheme, names in self.groups for target in names]
        for matches in (
            lambda target: target == name,
            lambda target: _names(target, name),
            lambda target: target == kind,
        ):
            for target, scheme in targets:
                if matches(target):
                    return scheme
        return None


def _names(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name


def parse_config(quantization_config: Mapping[str, Any]) -> CheckpointConfig:
    """Read a `quantization_config` written by us or by any other tool.

    Raises:
        FormatError: it is not integer, weight-only and pack-quantized in a width and group size
            that `QuantScheme` can hold.
    """
    method = quantization_config.get("quant_method")
    if method != METHOD:
        raise FormatError(f"quant_method={method!r}: only {METHOD!r} checkpoints can be read.")
    for key in ("kv_cache_scheme", "transform_config"):
        if quantization_config.get(key):
            raise FormatError(f"quantization_config.{key} is set: only weights may be quantized.")
    sparsity = quantization_config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise FormatError(f"sparsity_config.format={sparsity['format']!r} is not supported.")
    groups = quantization_config.get("config_groups") or {}
    if not groups:
        raise FormatError("quantization_config.config_groups is empty: nothing is quantized.")
    default = quantization_config.get("format")
    parsed = [_parse_group(name, group, default) for name, group in groups.items()]
    return CheckpointConfig(
        tuple((scheme, targets) for layout, scheme, targets in parsed if layout != BYTEWISE),
        tuple(quantization_config.get("ignore") or ()),
        {target: s for layout, s, targets in parsed if layout == BYTEWISE for target in targets},
    )


def _parse_group(
    name: str, group: Any, default: str | None
) -> tuple[str, QuantScheme, tuple[str, ...]]:
    """One entry of config_groups: format, scheme and targets."""

    def refuse(reason: str) -> FormatError:
        return FormatError(
            f"config_groups.{name}: {reason}. llmq reads integer weight-only {FORMAT} checkpoints."
        )

    if not isinstance(group, Mapping):
        raise refuse("a named preset instead of a scheme")
    weights = group.get("weights") or {}
    targets = tuple(group.get("targets") or ())
    layout = str(group.get("format") or default)
    by_name = all(t[:1].islower() and not t.startswith("re:") for t in targets)  # no class
    bytewise = layout == BYTEWISE and weights.get("num_bits") == 8 and by_name
    special = (codebook.FORMAT, superblocks.FORMAT)
    if layout not in (FORMAT, *special) and not bytewise:
        raise refuse(f"format={layout!r}")
    if group.get("input_activations") or group.get("output_activations"):
        raise refuse("activations are quantized")
    kind = layout if layout in special else "int"
    if weights.get("type", "int") != kind or weights.get("dynamic"):
        raise refuse(f"type={weights.get('type')!r}, dynamic={weights.get('dynamic')!r}")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise refuse(f"actorder={weights['actorder']!r} needs an input permutation")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "channel" if group_size in (None, -1) else "group"
    if strategy not in ("group", "channel"):
        raise refuse(f"strategy={strategy!r}")
    bits, width = weights.get("num_bits", 0), -1 if strategy == "channel" else group_size or 0
    try:
        if kind == codebook.FORMAT:
            return layout, codebook.parse(weights, bits, width), targets
        if kind == superblocks.FORMAT:
            return layout, superblocks.parse(weights, bits, width), targets
        scheme = QuantScheme(bits, width, symmetric=weights.get("symmetric", True))
    except SchemeError as error:
        raise refuse(str(error).rstrip(".")) from error
    return layout, scheme, targets
