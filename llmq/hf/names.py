"""What config.json says about a model with packed modules, under the names of its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel

from llmq.errors import SchemeError
from llmq.formats import compressed_tensors
from llmq.nn import (
    STACKS,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    UnpackedLinear,
    packed_modules,
)
from llmq.scheme import QuantScheme

_LINEARS = PackedLinear | UnpackedLinear


def checkpoint_config(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` for config.json of a model with packed modules.

    The scheme that most modules have is the group "Linear"; the others are named one by one.
    Names are those of the file, in which everything that other engines might take for a linear
    layer (routers too) and that is not packed is listed under `ignore`.
    """
    schemes: dict[QuantScheme, list[str]] = {}
    for name, module in packed_modules(model):
        if any(key.endswith("_order") for key, _ in module.named_parameters()):
            raise SchemeError(
                f"{name}: its inputs are ordered by importance (desc_act), which "
                "compressed-tensors has no place for. The checkpoint it came from can be used as "
                "it is."
            )
        experts = isinstance(module, PackedExperts)
        for stem, scheme in (module.schemes if experts else {"weight": module.scheme}).items():
            packed = {f"{name}.{stem}_packed": module.get_parameter(f"{stem}_packed")}
            schemes.setdefault(scheme, []).extend(_written(model, packed))
    if not schemes:
        raise SchemeError("The model has no packed module: quantize it first.")
    most = max(schemes, key=lambda scheme: len(schemes[scheme]))
    groups = {most: ["Linear"]} | {s: names for s, names in schemes.items() if s != most}
    head = _head(model)
    if head and isinstance(head[1], _LINEARS) and head[1].scheme == most:
        written = _written(model, {f"{head[0]}.weight_packed": head[1].weight_packed})
        groups[most] += [f"re:.*{name}" for name in sorted({head[0], *written})]
    return compressed_tensors.config(groups, _dense_names(model), _embeddings(model))


def _embeddings(model: PreTrainedModel) -> dict[QuantScheme, list[str]]:
    """Scheme -> the names of a packed input embedding: that in the model and that in the file."""
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            written = _written(model, {f"{name}.weight": module.weight})
            return {module.scheme: sorted({name, *written})}
    return {}


def _written(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names that the modules or stacks with these `tensors` have in the file."""
    keys = revert_weight_conversion(model, dict(tensors))
    return [key.removesuffix("_packed").removesuffix(".weight") for key in keys]


def _head(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """The output embeddings and their name."""
    head = model.get_output_embeddings()
    return next(((name, module) for name, module in model.named_modules() if module is head), None)


def _dense_names(model: PreTrainedModel) -> list[str]:
    """Names, as in the file, of matrices that are neither packed nor embeddings.

    The head is also listed under its name in the model: engines differ in which one they ask for.
    """
    kinds = nn.Embedding | PackedEmbedding
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    dense = {
        key: value
        for key, value in model.named_parameters()
        if (key.endswith(".weight") and value.ndim == 2 and id(value) not in embeddings)
        or (key.endswith(STACKS) and value.ndim == 3)
    }
    head = _head(model)
    names = set()
    if head and not isinstance(head[1], _LINEARS):
        dense[f"{head[0]}.weight"] = head[1].get_parameter("weight")
        names.add(head[0])
    return sorted(names.union(_written(model, dense)))
