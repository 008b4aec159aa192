"""Packed models for tests of `llmq.hf`, and how they are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llmq.nn import PackedLinear
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, 32, False)


def packed(
    name: str, scheme: QuantScheme = ASYMMETRIC, dtype: torch.dtype = torch.bfloat16, **changes
) -> PreTrainedModel:
    """A tiny model with everything in its blocks rounded to nearest."""
    return round_to_nearest(zoo.tiny_model(name, dtype, **changes), scheme)


def round_to_nearest(model: Any, scheme: QuantScheme = ASYMMETRIC) -> Any:
    """`model`, with everything in its blocks rounded in place."""
    list(quantize(model, [zoo.tiny_ids()], Recipe(scheme, RTN())))
    return model


def with_packed_head(model: Any, scheme: QuantScheme = ASYMMETRIC) -> Any:
    head = model.get_output_embeddings()
    W = head.weight.detach()
    q = RTN().solve(W, torch.eye(W.shape[1]), scheme)
    model.set_output_embeddings(PackedLinear.from_quantized(q))
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(zoo.tiny_ids(seed=1) if ids is None else ids).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def groups(config: dict) -> list[dict]:
    return list(config["quantization_config"]["config_groups"].values())
