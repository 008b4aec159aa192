"""GPTQ and AWQ checkpoints: each module is repacked while transformers loads it.

    loading_conversions    the converters that do so, in front of the model's own
    Repack                 the operation inside them

A converter collects the tensors of one module, or of all experts of one stack. Its operation
reads them (`formats.layouts`) and returns the parameters of `nn.PackedLinear` or
`nn.PackedExperts`; after that nothing remembers what the file looked like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from llmq.errors import FormatError
from llmq.formats import compressed_tensors
from llmq.formats.layouts import Layout
from llmq.nn import STACKS, PackedExperts, PackedLinear
from llmq.scheme import QuantizedWeight


def loading_conversions(transforms: Sequence[Any], layout: Layout) -> list[Any]:
    """`transforms` of a dense model, preceded by those that repack its modules."""
    repack = Repack(layout)
    found: list[Any] = []
    for transform in transforms:
        if not isinstance(transform, WeightConverter):
            continue
        sources, targets = transform._original_source_patterns, transform._original_target_patterns
        if len(targets) > 1 or not targets[0].endswith(STACKS):
            continue
        if not all(source.endswith(".weight") for source in sources):
            continue
        stems = [source.removesuffix("weight") for source in sources]
        converter = WeightConverter(
            [stem + suffix for stem in stems for suffix in layout.suffixes],
            targets[0] + "_packed",
            [repack],
        )
        converter.scope_prefix = transform.scope_prefix
        converter.base_model_prefix = transform.base_model_prefix
        found.append(converter)
    linear = WeightConverter([f".{s}" for s in layout.suffixes], ".weight_packed", [repack])
    return [*found, linear, *transforms]


def is_repacking(transform: Any) -> bool:
    """Whether `transform` is one of ours."""
    return any(isinstance(op, Repack) for op in getattr(transform, "operations", ()))


class Repack(ConversionOps):
    """The tensors of one module in a file -> the parameters of its packed module, by full name."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        source_patterns: list[str],
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        name, _, parameter = full_layer_name.rpartition(".")
        module = model.get_submodule(name)
        stack = parameter.removesuffix("_packed")
        if isinstance(module, PackedExperts):
            scheme = module.schemes[stack]
        elif isinstance(module, PackedLinear):
            scheme = module.scheme
        else:
            raise FormatError(f"{name}: packed, but {type(module).__name__} cannot be.")
        own = module._parameters
        stems = list(dict.fromkeys(pattern.rpartition(".")[0] for pattern in source_patterns))
        matrices = []
        for index in range(len(next(iter(input_dict.values())))):
            parts = [
                self.layout.read(name, self._of_one(name, input_dict, stem, index), scheme)
                for stem in stems
            ]
            tensors = _parameters(name, parts, ordered=own.get(f"{stack}_order") is not None)
            tensors["_scale"] = tensors["_scale"].to(own[f"{stack}_scale"].dtype)  # type: ignore[union-attr]
            matrices.append(tensors)
        if isinstance(module, PackedLinear):
            (found,) = matrices
        else:
            found = {key: torch.stack([one[key] for one in matrices]) for key in matrices[0]}
        return {f"{name}.{stack}{key}": tensor for key, tensor in found.items()}

    def _of_one(self, name: str, collected: dict[str, Any], stem: str, index: int):
        """The tensors of one matrix under the keys that `Layout.read` looks for."""
        return {
            f"{name}.{suffix}": collected[f"{stem}.{suffix}"][index]
            for suffix in self.layout.suffixes
            if f"{stem}.{suffix}" in collected
        }


def _parameters(name: str, parts: list[QuantizedWeight], ordered: bool) -> dict[str, Tensor]:
    """Suffix -> parameter of one matrix, the rows of which are those of `parts`.

    Raises:
        FormatError: the parts read their inputs in different orders.
    """
    K = parts[0].shape[1]
    orders = [torch.arange(K) if q.order is None else q.order.cpu() for q in parts]
    if any(not torch.equal(order, orders[0]) for order in orders):
        raise FormatError(f"{name}: gate and up order their inputs differently.")
    rows = zip(*((q.codes, q.scale, q.zero) for q in parts), strict=True)
    whole = QuantizedWeight(parts[0].scheme, *(torch.cat(column) for column in rows))
    written = compressed_tensors.write("", whole)
    tensors = {key.removeprefix("weight"): tensor for key, tensor in written.items()}
    tensors["_shape"] = torch.tensor([size for q in parts for size in q.shape])
    if ordered:
        tensors["_order"] = orders[0]
    device = parts[0].codes.device
    return {key: tensor.to(device) for key, tensor in tensors.items()}
