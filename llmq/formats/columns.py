"""What the layouts of GPTQ and AWQ share: inputs run down the columns of their tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq.errors import FormatError, SchemeError
from llmq.formats import parts
from llmq.scheme import QuantizedWeight, QuantScheme

V = TypeVar("V")
# Layers that engines join into one; what is said of the parts must be said of the whole.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def half_scales(q: QuantizedWeight) -> Tensor:
    """Scales (N, K/G) rounded to fp16, the dtype in which these layouts are read.

    fp16 holds every bf16 number from 2**-17 to 65280, and so the scales of nearly all models
    exactly; `lossy_scales` tells the others. Groups whose weights are all zero get a scale of 1
    if their own does not fit: any would do.

    Raises:
        SchemeError: a scale is too large for fp16.
    """
    half = q.scale.to(torch.float16)
    half = half.masked_fill(_changed(q, half) & _empty_groups(q), 1)
    if not bool(half.isfinite().all()):
        raise SchemeError(f"a scale of {float(q.scale.max()):g} is too large for float16.")
    return half


def lossy_scales(q: QuantizedWeight) -> tuple[int, float]:
    """How many scales `half_scales` changes, and the largest relative change."""
    half = half_scales(q)
    changed = _changed(q, half) & ~_empty_groups(q)
    if not bool(changed.any()):
        return 0, 0.0
    before, after = q.scale[changed].double(), half[changed].double()
    return int(changed.sum()), float(((after - before) / before).abs().max())


def _changed(q: QuantizedWeight, half: Tensor) -> Tensor:
    return half.float() != q.scale.float()


def _empty_groups(q: QuantizedWeight) -> Tensor:
    """bool (N, K/G): groups in which every weight is 0."""
    codes = q.codes.unflatten(1, (q.scale.shape[1], -1))
    return (codes == q.zero.unsqueeze(-1)).all(-1)


def shapes_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of the module's qweight, if it is there, as `matrix_shape` takes it."""
    where = parts.key(name, "qweight")
    return {where: tuple(tensors[where].shape)} if where in tensors else {}


def matrix_shape(name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """The shape of the module's qweight.

    Raises:
        FormatError: it is missing or no matrix.
    """
    found = shapes.get(parts.key(name, "qweight"))
    if found is None or len(found) != 2:
        raise FormatError(f"{parts.key(name, 'qweight')} is missing or no matrix: {found}.")
    return found[0], found[1]


def check_symmetric(name: str, zero: Tensor, scheme: QuantScheme) -> None:
    """Refuse zeros that contradict a symmetric scheme.

    Raises:
        FormatError: names the module.
    """
    if scheme.symmetric and not bool((zero == scheme.middle).all()):
        where = parts.key(name, "qzeros")
        raise FormatError(f"{where} is not {scheme.middle} throughout: asymmetric.")


def check_method(quantization_config: Mapping[str, Any], method: str) -> None:
    """Refuse the configuration of another method.

    Raises:
        FormatError: names it.
    """
    found = quantization_config.get("quant_method")
    if found != method:
        raise FormatError(f"quant_method={found!r}: expected {method!r}.")


def parse_scheme(bits: Any, group_size: Any) -> QuantScheme:
    """What config.json says, taken as asymmetric, since that holds any zeros.

    Raises:
        FormatError: a width or group size that `QuantScheme` does not have.
    """
    try:
        return QuantScheme(bits, group_size, symmetric=False)
    except SchemeError as error:
        raise FormatError(f"quantization_config: {error}") from error


def most_common(schemes: Mapping[str, QuantScheme]) -> QuantScheme:
    """The scheme that most modules have."""
    return Counter(schemes.values()).most_common(1)[0][0]


def pattern(name: str) -> str:
    """A regular expression that matches `name` alone."""
    return f"^{re.escape(name)}$"


def with_fused(entries: Mapping[str, V]) -> dict[str, V]:
    """`entries`, and the fused layers all parts of which are there with the same value."""
    found = dict(entries)
    for name, value in entries.items():
        parent, _, leaf = name.rpartition(".")
        for whole, pieces in FUSED.items():
            if leaf == pieces[0] and all(
                f"{parent}.{piece}" in entries and entries[f"{parent}.{piece}"] == value
                for piece in pieces
            ):
                found[f"{parent}.{whole}"] = value
    return found
