"""Packed checkpoints in transformers: load, save, and `from_pretrained` by itself.

    load      a packed checkpoint (or any other) as a transformers model, weights kept packed
    save      a packed model as a compressed-tensors checkpoint on the original key names

Importing this module also makes plain `AutoModelForCausalLM.from_pretrained` and `pipeline` keep
integer weight-only compressed-tensors checkpoints packed. Other compressed-tensors checkpoints
(fp8, quantized activations, sparse ...) still go to whoever handled them before.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from llmq.errors import FormatError, OutputError, SourceError
from llmq.formats import compressed_tensors
from llmq.hf_quantizer import LlmqConfig, LlmqQuantizer, attach

__all__ = ["LlmqConfig", "attach", "load", "save"]

# What is copied from the original besides config.json and weights.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
)


@dataclass(frozen=True)
class _IntegerWeightsOnly:
    """Stands for the config class of "compressed-tensors": ours if we can, else the previous."""

    previous: Any

    def from_dict(self, quantization_config: dict[str, Any], **kwargs: Any) -> Any:
        try:
            compressed_tensors.parse_config(quantization_config)
        except FormatError:
            return self.previous.from_dict(quantization_config, **kwargs)
        return LlmqConfig(checkpoint=quantization_config)


def _take_over() -> None:
    known = AUTO_QUANTIZATION_CONFIG_MAPPING[compressed_tensors.METHOD]
    previous = getattr(known, "previous", known)  # this module may be reloaded
    AUTO_QUANTIZATION_CONFIG_MAPPING[compressed_tensors.METHOD] = _IntegerWeightsOnly(previous)  # type: ignore[assignment]
    AUTO_QUANTIZER_MAPPING["llmq"] = LlmqQuantizer


_take_over()


def load(path_or_name: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model; packed weights stay packed.

    Args:
        path_or_name: a folder or the name of a model on the Hub.
        kwargs: as for `AutoModelForCausalLM.from_pretrained`, such as `dtype`, `device_map`,
            or `quantization_config=LlmqConfig(...)` to quantize a full-precision model.

    Returns:
        The model in evaluation mode (and the loading info with `output_loading_info=True`).

    Raises:
        SourceError: there is no such model, or it is not a causal language model.
        FormatError: its files are damaged, incomplete or contradict its config.json.
    """
    hub = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    options = {key: kwargs[key] for key in hub if key in kwargs}
    try:
        config = AutoConfig.from_pretrained(path_or_name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{path_or_name}: no model can be read there. {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise SourceError(
            f"{path_or_name}: model_type={config.model_type!r} is not a causal language model."
        )
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path_or_name, output_loading_info=True, **kwargs
        )
    except SafetensorError as error:
        raise FormatError(f"{path_or_name}: a weight file is damaged ({error}).") from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{path_or_name}: weights cannot be read. {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{path_or_name}: {len(missing)} tensors are missing, such as {missing[0]}; "
            "transformers would fill them with random numbers."
        )
    return (model, info) if wants_info else model


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a packed model as a compressed-tensors `pack-quantized` checkpoint.

    Keys are those of the original checkpoint: experts one by one where it has them one by one
    (Mixtral, Qwen-MoE), stacked where it stacks them (gpt-oss), fused where it fuses them (Phi-3).
    GPT-2's Conv1D weights are written like those of a Linear, (N, K). The folder appears under
    its name only when complete.

    Args:
        model: a model with packed modules, quantized in memory or loaded.
        out: the folder to write; must not exist or be empty.
        source: the original: a folder or a name on the Hub. Its config.json is kept, except for
            what is no longer true of it, and its tokenizer, generation and chat template files
            are copied. Without it, the model's own config and generation config are written.
        tokenizer: written too, over the source's.
        max_shard_size: of one safetensors file.

    Returns:
        `out`.

    Raises:
        OutputError: `out` is in the way or cannot be written; nothing is left behind.
        SourceError: `source` has no config.json, or weights of `model` are offloaded.
    """
    attach(model)
    original = None if source is None else _original(source)
    with _appears_whole(Path(out)) as folder:
        _write_weights(folder, _tensors(model, original), max_shard_size)
        if original is None:
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        else:
            for path in sorted({p for glob in COMPANIONS for p in original.glob(glob)}):
                if path.is_file():
                    target = folder / path.relative_to(original)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config = json.dumps(_config(model, original), indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
    return Path(out)


def _original(source: str | Path) -> Path:
    """The folder that holds `source`."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source)))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
            raise SourceError(f"{source}: neither a folder nor a model on the Hub.") from error
    if not (folder / "config.json").is_file():
        raise SourceError(f"{source}: has no config.json.")
    return folder


@contextmanager
def _appears_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, or vanishes on any failure."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not an empty folder. Choose another, or empty it.")
    created = [parent for parent in out.absolute().parents if not parent.exists()]
    folder = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    done = False
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
        done = True
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{out}: cannot be written ({error}). Nothing was left behind."
        ) from error
    finally:
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created:
                if parent.exists():
                    parent.rmdir()


def _tensors(model: PreTrainedModel, original: Path | None) -> dict[str, Tensor]:
    """Every tensor to write, under the original's names."""
    own = model.state_dict()
    for key, kept in model.all_tied_weights_keys.items():
        if key in own and kept in own and own[key].data_ptr() == own[kept].data_ptr():
            del own[key]
    if offloaded := [key for key, tensor in own.items() if tensor.is_meta]:
        raise SourceError(
            f"{offloaded[0]} is offloaded. Load the model without offloading, or use "
            "model.save_pretrained, which reads offloaded weights back."
        )
    known = set() if original is None else _keys(original)
    prefix = f"{model.base_model_prefix}."
    tensors = {}
    for key, tensor in revert_weight_conversion(model, own).items():
        if key.endswith(("_scale", "_zero_point")) and tensor.ndim == 1:
            tensor = tensor.unsqueeze(-1)  # transformers 5.17 drops dimensions of size one
        dense = key if key in known else _dense_key(key)
        bare = dense.removeprefix(prefix)
        if known and dense not in known and (bare in known) != (prefix + dense in known):
            key = key.removeprefix(prefix) if bare in known else prefix + key
        tensors[key] = tensor
    return tensors


def _dense_key(key: str) -> str:
    """The key of the full-precision tensor that `key` belongs to."""
    for suffix in compressed_tensors.SUFFIXES:
        if key.endswith(f".{suffix}"):
            return key.removesuffix(suffix) + "weight"
    return key


def _keys(folder: Path) -> set[str]:
    """Keys of the weights in `folder`; empty if they are not safetensors."""
    keys: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            keys.update(tensors.keys())
    return keys


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """model.safetensors, or shards and their index."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        # Experts are views of their stack: copied here, one shard at a time.
        shard = {key: torch.clone(tensors[key].detach()).cpu().contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(model: PreTrainedModel, original: Path | None) -> dict[str, Any]:
    """The original's config.json, or the model's, with what is true of the packed model."""
    dtype = str(model.dtype).removeprefix("torch.")
    if original is None:
        config = json.loads(model.config.to_json_string())
        config |= {"architectures": [type(model).__name__], "dtype": dtype}
        config.pop("_name_or_path", None)
    else:
        config = json.loads((original / "config.json").read_text(encoding="utf-8"))
        # Scales must come back in the dtype they were written in.
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if not model.config.tie_word_embeddings and model.all_tied_weights_keys == {}:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = model.config.quantization_config.to_dict()
    return config
