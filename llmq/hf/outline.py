"""A model as shapes only: what quantizing it would write, to the byte, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmq.hf.quantizer import attach
from llmq.hf.saving import SHARD_SIZE, checkpoint_tensors, shard_index, shards
from llmq.hf.skeleton import out_in, put
from llmq.nn import STACKS, PackedEmbedding, PackedExperts, is_stacked_experts, linear_like
from llmq.scheme import QuantScheme
from llmq.shards import file_bytes


def outline(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a transformers `config` on the meta device: shapes and dtypes, no storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def pack_outline(model: PreTrainedModel, schemes: Mapping[str, QuantScheme]) -> None:
    """Put packed modules where a run would put them.

    Args:
        model: on meta; changed in place.
        schemes: matrix (a linear, one stack of a module of experts, or the input embeddings) -> its
            number format.
    """
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, PackedExperts):  # packed with its other stack
            continue
        if leaf in STACKS and is_stacked_experts(owner):
            both = [schemes.get(f"{parent}.{stack}") for stack in STACKS]
            if all(both):
                put(model, parent, PackedExperts(owner, *both))  # type: ignore[arg-type]
            continue
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            put(model, name, PackedEmbedding(scheme, module))
            continue
        N, K = out_in(module)  # type: ignore[arg-type]
        dtype = module.get_parameter("weight").dtype
        packed = linear_like(scheme, K, N, module.bias is not None, dtype)
        if module is model.get_output_embeddings():
            model.set_output_embeddings(packed)
        else:
            put(model, name, packed)
    attach(model)


def stored_bytes(model: nn.Module, known: set[str], max_shard_size: int | str = SHARD_SIZE) -> int:
    """Size of all files of weights that saving `model` (packed, on meta) would write, in bytes.

    Args:
        known: keys of the original checkpoint.
    """
    tensors = checkpoint_tensors(model, known)
    split = shards(tensors, max_shard_size)
    total = sum(
        file_bytes({key: tensors[key] for key in keys})
        for keys in split.filename_to_tensors.values()
    )
    return total + (len(shard_index(split).encode()) if split.is_sharded else 0)
