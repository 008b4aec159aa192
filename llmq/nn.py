"""Modules that keep their weights packed.

    PackedLinear    in place of nn.Linear (or transformers' Conv1D)
    UnpackedLinear  the same without kernels: CodebookLinear, SuperBlockLinear (`lookup`)
    PackedExperts   in place of a module that stacks its experts in 3-D parameters
    PackedEmbedding in place of nn.Embedding: rows are looked up, nothing is multiplied

Parameters have the names and the layout of the file (`formats.compressed_tensors`), so loading
copies bytes. They are frozen Parameters, not buffers, because that is what `device_map` can
offload. `prepare` chooses a backend; before that, `forward` is the plain torch reference.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmq import backends
from llmq.codebook import CodebookScheme, CodebookWeight
from llmq.embedding import PackedEmbedding
from llmq.experts import (
    STACKS,
    PackedExperts,
    expert_bias,
    expert_weight,
    is_stacked_experts,
    without_parameters,
)
from llmq.linear import HELD, PackedLinear
from llmq.lookup import CodebookLinear, SuperBlockLinear, UnpackedLinear
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.superblocks import SuperBlockScheme, SuperBlockWeight

__all__ = [
    "HELD",
    "STACKS",
    "CodebookLinear",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "SuperBlockLinear",
    "UnpackedLinear",
    "expert_bias",
    "expert_weight",
    "is_stacked_experts",
    "linear_from",
    "linear_like",
    "packed_modules",
    "prepare",
    "without_parameters",
]

logger = logging.getLogger(__name__)


Packed = PackedLinear | PackedExperts | UnpackedLinear


def linear_from(q: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear | UnpackedLinear:
    """The layer that holds a solver's result; `bias` (N,) is kept in its own dtype."""
    if isinstance(q, CodebookWeight):
        return CodebookLinear.from_quantized(q, bias)
    if isinstance(q, SuperBlockWeight):
        return SuperBlockLinear.from_quantized(q, bias)
    return PackedLinear.from_quantized(q, bias)


def linear_like(
    scheme: QuantScheme, K: int, N: int, bias: bool, dtype: torch.dtype, ordered: bool = False
) -> PackedLinear | UnpackedLinear:
    """A layer (N, K) on meta for a loader to fill; see `PackedLinear` for the arguments."""
    if isinstance(scheme, CodebookScheme):
        return CodebookLinear(scheme, K, N, bias, dtype, "meta")
    if isinstance(scheme, SuperBlockScheme):
        return SuperBlockLinear(scheme, K, N, bias, dtype, "meta")
    return PackedLinear(scheme, K, N, bias, dtype, "meta", ordered)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Every packed module of `model` that multiplies, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield name, module


def prepare(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Choose a backend for every packed module of `model`, in place; returns `model`.

    Logs one line if any of them is left to plain torch although nobody asked for that.

    Raises:
        BackendError: the named backend cannot run one of the layers.
    """
    slow: Counter[str] = Counter()
    for _, module in packed_modules(model):
        module.prepare(backend)
        if isinstance(module, UnpackedLinear):
            if backend is None:
                slow[f"{module.named} have no kernel"] += 1
            continue
        layer = module if isinstance(module, PackedLinear) else module.expert(0)[0]
        if backend is None and backends.choose(layer) == backends.TORCH:
            slow[backends.why_plain(layer)] += 1
    if slow:
        reason, _ = slow.most_common(1)[0]
        logger.warning("%d packed modules run on plain torch: %s", slow.total(), reason)
    return model
