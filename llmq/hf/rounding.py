"""While loading a full-precision checkpoint: round each weight as it arrives."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmq.errors import SchemeError
from llmq.hf.skeleton import out_in, put
from llmq.nn import STACKS, PackedExperts, PackedLinear, expert_weight, is_stacked_experts
from llmq.scheme import (
    QuantizedWeight,
    QuantScheme,
    check_groups,
    grouped,
    minmax_grid,
    round_to_grid,
)


def chosen_parameters(
    model: PreTrainedModel, scheme: QuantScheme, skip: Iterable[str], lm_head: bool
) -> frozenset[str]:
    """The parameters to round: every linear layer and stack of experts not skipped.

    Raises:
        SchemeError: the group size does not divide some of them.
    """
    head = model.get_output_embeddings()
    chosen: dict[str, int] = {}
    for name, module in model.named_modules():
        if any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in skip):
            continue
        if isinstance(module, nn.Linear | Conv1D) and (module is not head or lm_head):
            chosen[f"{name}.weight"] = out_in(module)[1]
        elif is_stacked_experts(module):
            widths = {stack: expert_weight(module, stack, 0).shape[1] for stack in STACKS}
            chosen |= {f"{name}.{stack}": width for stack, width in widths.items()}
    check_groups(chosen, lambda _: scheme)
    if head is not None and lm_head and model.config.tie_word_embeddings:
        raise SchemeError("lm_head=True: the head is tied to the embeddings, so it has no weight.")
    return frozenset(chosen)


def _round_to_nearest(W: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """RTN of W (N, K), scales in W's dtype."""
    scale, zero = minmax_grid(grouped(W.float(), scheme), scheme, W.dtype)
    return round_to_grid(W, scale, zero, scheme, W.dtype)


class RoundToNearest(ConversionOps):
    """Rounds one weight as it arrives and puts the packed module in the dense one's place."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        missing_keys.discard(full_layer_name)
        name, _, attribute = full_layer_name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D):
            W = tensor if isinstance(module, nn.Linear) else tensor.T
            packed = PackedLinear.from_quantized(_round_to_nearest(W, self.scheme))
        else:
            # Both stacks are needed before the module can be replaced.
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            if any(module.get_parameter(stack).is_meta for stack in STACKS):
                return {}
            packed = PackedExperts.from_quantized(
                module, *(_rounded_experts(module, stack, self.scheme) for stack in STACKS)
            )
        tensors: dict[str, Tensor] = {
            f"{name}.{key}": value for key, value in packed.named_parameters()
        }
        for key, parameter in module.named_parameters():  # biases, loaded already or still to come
            if key == "bias" or key.endswith("_bias"):
                packed.register_parameter(key, parameter)
                tensors.pop(f"{name}.{key}", None)
        put(model, name, packed)
        return tensors


def _rounded_experts(experts: nn.Module, stack: str, scheme: QuantScheme) -> list[QuantizedWeight]:
    count = len(experts.get_parameter(stack))
    return [_round_to_nearest(expert_weight(experts, stack, i), scheme) for i in range(count)]
