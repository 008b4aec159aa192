"""Checkpoints with random weights, made from a configuration of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmq import demo


def write_model(config: Any, folder: Path, device: str = "cpu") -> None:
    """Write a model and the tokenizer of llmq's own small one.

    Args:
        config: with its dtype and sizes.
        folder: to create.
        device: where the weights are drawn.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.save_pretrained(folder)
    copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> None:
    """The tokenizer of llmq's own small model; larger vocabularies only use its first entries."""
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    for path in demo.model_path().iterdir():
        if path.name not in weights:
            shutil.copy(path, folder)
