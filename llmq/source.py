"""Open a model that somebody else wrote, and say clearly why it cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmq import hf
from llmq.errors import BackendError, NonFiniteError, SourceError
from llmq.fuse import fuse_on_gpu
from llmq.stored import Header, tensor_headers

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def check_path(src: str | os.PathLike[str]) -> str:
    """The source as transformers wants it, checked as far as no network is needed.

    Raises:
        SourceError: a path that does not exist, or a folder without config.json.
    """
    path = Path(src)
    name = os.fspath(src)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"{name}: this folder holds no config.json, so it is no model.")
        return name
    if path.exists():
        raise SourceError(f"{name}: a file; give the folder of a model, or a name on the Hub.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(f"{name}: no such folder.")
    return name


def open_config(src: str) -> Any:
    """The configuration of a decoder-only language model.

    Raises:
        SourceError: not found, not readable, or not a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(src)
    except (OSError, ValueError, KeyError) as error:
        what = "its config.json cannot be used" if Path(src).is_dir() else "no such folder, and"
        raise SourceError(f"{src}: {what}: {_first_line(error)}") from error
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    built = list(getattr(config, "architectures", None) or ["ForCausalLM"])
    if not known or not any(name.endswith(_CAUSAL_ENDINGS) for name in built):
        raise SourceError(
            f"{src}: not a causal language model (model_type={config.model_type}, "
            f"architectures={', '.join(built)}). llmq quantizes decoder-only models that "
            "AutoModelForCausalLM loads."
        )
    return config


def open_original(src: str | os.PathLike[str]) -> tuple[str, Any]:
    """Checked name and configuration of a model that is not quantized.

    Raises:
        SourceError: as `check_path` and `open_config`, or it is quantized.
    """
    name = check_path(src)
    config = open_config(name)
    if getattr(config, "quantization_config", None):
        raise SourceError(f"{name}: already quantized. Give the full-precision model.")
    return name, config


def source_headers(src: str) -> dict[str, Header]:
    """Dtype and shape of every tensor of a checkpoint; no weight is read or downloaded.

    Raises:
        SourceError: not found, or not in safetensors.
        FormatError: a damaged file.
    """
    if Path(src).is_dir():
        return tensor_headers(Path(src))
    try:
        found = get_safetensors_metadata(src)
    except (HfHubHTTPError, NotASafetensorsRepoError, ValueError, OSError) as error:
        raise SourceError(f"{src}: headers cannot be read: {_first_line(error)}") from error
    return {
        key: Header(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in found.files_metadata.values()
        for key, info in file.tensors.items()
    }


def open_tokenizer(src: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(src)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{src}: no tokenizer that can be loaded. Put tokenizer.json and "
            f"tokenizer_config.json beside config.json. ({_first_line(error)})"
        ) from error


def open_model(src: str, device: str = "cpu") -> PreTrainedModel:
    """A model as it is stored, every weight of it read from the checkpoint and finite.

    Raises:
        SourceError: no such model, or weights of another shape than its config says.
        FormatError: weights that are missing or damaged.
        NonFiniteError: names the first tensor that holds NaN or infinity.
    """
    try:
        model, info = hf.load(
            src, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise SourceError(f"{src}: weights cannot be loaded: {_first_line(error)}") from error
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise SourceError(
            f"{src}: {name} has shape {tuple(found)}, but config.json says {tuple(expected)}."
        )
    check_finite(model)
    model.to(device).eval()
    fuse_on_gpu(model)  # moving the model undid it
    return model


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite.

    Raises:
        NonFiniteError: names the first such tensor.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite. "
                "The checkpoint is damaged; get it again."
            )


def pick_device(device: str) -> str:
    """A device that exists; "auto" is the GPU if there is one.

    Raises:
        BackendError: no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device={device!r} cannot be used: {_first_line(error)}") from error
    return device


def context_length(config: Any) -> int | None:
    """How many positions the model has; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
