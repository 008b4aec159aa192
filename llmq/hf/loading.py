"""Load a causal language model, from a folder or from the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from llmq.errors import FormatError, SourceError
from llmq.formats import awq, compressed_tensors, gptq
from llmq.formats.layouts import layout_of
from llmq.fuse import fuse_on_gpu, fuse_shared_inputs, head_scheme, pack_head
from llmq.hf.quantizer import LlmqConfig, LlmqQuantizer, attach
from llmq.nn import prepare

METHODS = (compressed_tensors.METHOD, gptq.METHOD, awq.METHOD)


@dataclass(frozen=True)
class _IntegerWeightsOnly:
    """Stands for the config class of a method: ours where llmq reads it, else the previous."""

    previous: Any

    def from_dict(self, quantization_config: dict[str, Any], **kwargs: Any) -> Any:
        try:
            layout_of(quantization_config)
        except FormatError:
            return self.previous.from_dict(quantization_config, **kwargs)
        return LlmqConfig(checkpoint=quantization_config)


def take_over() -> None:
    """Register the quantizer, and put it in charge of the checkpoints it can read."""
    for method in METHODS:
        known = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        previous = getattr(known, "previous", known)  # this package may be reloaded
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _IntegerWeightsOnly(previous)  # type: ignore[assignment]
    AUTO_QUANTIZER_MAPPING["llmq"] = LlmqQuantizer


def load(
    path_or_name: str | Path,
    *,
    backend: str | None = None,
    fuse: bool | None = None,
    head_bits: int | None = None,
    **kwargs: Any,
) -> Any:
    """Load a causal language model; packed weights stay packed.

    Args:
        path_or_name: a folder or the name of a model on the Hub.
        backend: how packed layers are multiplied, see `llmq.backends`; None = the fastest that can
            run each layer.
        fuse: multiply packed layers that read one tensor (q, k, v; gate, up) together. Parameters
            keep their names and values. None = where the Triton kernels run.
        head_bits: 8 to 2: round the output layer to nearest too, for faster decoding; it is read
            whole for every token. None = leave it as it is in the checkpoint.
        kwargs: as for `AutoModelForCausalLM.from_pretrained`, such as `dtype`, `device_map`,
            or `quantization_config=LlmqConfig(...)` to quantize a full-precision model.

    Returns:
        The model in evaluation mode (and the loading info with `output_loading_info=True`).

    Raises:
        SourceError: there is no such model, or it is not a causal language model.
        FormatError: its files are damaged, incomplete or contradict its config.json.
        BackendError: `backend` cannot run one of the layers.
        SchemeError: `head_bits` is not a number of bits that llmq packs.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    _check_config(path_or_name, kwargs)
    model, info = _read(path_or_name, kwargs)
    head = model.get_output_embeddings()
    if head_bits is not None and isinstance(head, nn.Linear):
        pack_head(model, head_scheme(head.in_features, head_bits))
        attach(model)
    if backend is not None:
        prepare(model, backend)
    if fuse:
        device = model.get_input_embeddings().weight.device
        fuse_shared_inputs(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    elif fuse is None:
        fuse_on_gpu(model)
    return (model, info) if wants_info else model


def _check_config(path_or_name: str | Path, options: dict[str, Any]) -> None:
    """Refuse what is no causal language model, or quantized in a way that nobody here knows."""
    hub = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    try:
        config = AutoConfig.from_pretrained(
            path_or_name, **{key: options[key] for key in hub if key in options}
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{path_or_name}: no model can be read there. {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise SourceError(
            f"{path_or_name}: model_type={config.model_type!r} is not a causal language model."
        )
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise FormatError(  # transformers would fill the layers with random numbers
            f"{path_or_name}: quant_method={method!r} is known neither to llmq, which reads "
            f"{', '.join(METHODS)}, nor to this version of transformers."
        )


def _read(path_or_name: str | Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A complete model and its loading info."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_name, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise FormatError(f"{path_or_name}: a weight file is damaged ({error}).") from error
    except (OSError, ImportError) as error:  # the package of another method may be missing
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{path_or_name}: weights cannot be read. {reason}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{path_or_name}: {len(missing)} tensors are missing, such as {missing[0]}; "
            "transformers would fill them with random numbers."
        )
    return model, info
