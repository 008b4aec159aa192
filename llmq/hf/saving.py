"""Save a packed model as a checkpoint that other engines load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    StateDictSplit,
    snapshot_download,
    split_state_dict_into_shards_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from llmq.errors import SourceError
from llmq.formats import codebook, compressed_tensors
from llmq.hf.quantizer import attach
from llmq.output import staged_folder, writing
from llmq.shards import DTYPES, INDEX, Entry, combine, natural

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


SHARD_SIZE = "5GB"


def save(
    model: Any,
    out: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> Path:
    """Write a packed model as a compressed-tensors `pack-quantized` checkpoint.

    Keys are those of the original checkpoint: experts one by one where it has them one by one
    (Mixtral, Qwen-MoE), stacked where it stacks them (gpt-oss), fused where it fuses them (Phi-3).
    GPT-2's Conv1D weights are written like those of a Linear, (N, K). The folder appears under
    its name only when complete.

    Stock transformers with compressed-tensors computes the same logits from a symmetric
    checkpoint, except for packed Conv1D layers and gpt-oss experts: it does not know these and
    fills them with random numbers (its loading report lists them as missing).

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
    original = None if source is None else original_folder(source)
    with staged_folder(out) as folder, writing(out):
        known = set() if original is None else _keys(original)
        tensors = checkpoint_tensors(model, known)
        if offloaded := [key for key, tensor in tensors.items() if tensor.is_meta]:
            raise SourceError(
                f"{offloaded[0]} is offloaded. Load the model without offloading, or use "
                "model.save_pretrained, which reads offloaded weights back."
            )
        _write_weights(folder, tensors, max_shard_size)
        write_companions(model, folder, original)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out)


def write_companions(model: Any, folder: Path, original: Path | None) -> None:
    """Everything of a checkpoint but its weights: config.json, tokenizer, chat template, ..."""
    if original is None:
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    else:
        for path in sorted({p for glob in COMPANIONS for p in original.glob(glob)}):
            if path.is_file():
                target = folder / path.relative_to(original)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    config = json.dumps(_config(model, original), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")


def original_folder(source: str | Path) -> Path:
    """The folder that holds `source`, of the Hub's cache if `source` is a name on the Hub.

    Raises:
        SourceError: neither, or it has no config.json.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            wanted = ["config.json", "model*.safetensors", "model*.json", *COMPANIONS]
            folder = Path(snapshot_download(str(source), allow_patterns=wanted))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
            raise SourceError(f"{source}: neither a folder nor a model on the Hub.") from error
    if not (folder / "config.json").is_file():
        raise SourceError(f"{source}: has no config.json.")
    return folder


def checkpoint_tensors(
    model: Any, known: Collection[str], part: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor to write, under the original's names and sorted by these.

    Args:
        model: packed and attached; on meta, tensors are shapes and dtypes only.
        known: keys of the original checkpoint; empty = the model's own names.
        part: whole blocks of the model's state dict; None = all of it.
    """
    own = dict(model.state_dict() if part is None else part)
    for key, kept in model.all_tied_weights_keys.items():
        if key in own and kept in own and own[key].data_ptr() == own[kept].data_ptr():
            del own[key]
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
    return {key: tensors[key] for key in sorted(tensors, key=natural)}


def _dense_key(key: str) -> str:
    """The key of the full-precision tensor that `key` belongs to."""
    for suffix in (*compressed_tensors.SUFFIXES, *codebook.OWN):
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


def shards(tensors: Mapping[str, Tensor], max_shard_size: int | str = SHARD_SIZE) -> StateDictSplit:
    """Which file each tensor goes to."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def shard_index(split: StateDictSplit) -> str:
    """The text of model.safetensors.index.json."""
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return json.dumps(index, indent=2) + "\n"


def assemble(
    found: Mapping[str, Entry], folder: Path, max_shard_size: int | str = SHARD_SIZE
) -> dict[str, str]:
    """Write the weights of a checkpoint from tensors that lie in other files.

    Returns:
        the SHA-256 of every file of tensors.
    """
    outlines = {
        key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for key, entry in found.items()
    }
    split = shards(outlines, max_shard_size)
    digests = {
        name: combine({key: found[key] for key in keys}, folder / name)
        for name, keys in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        (folder / INDEX).write_text(shard_index(split), encoding="utf-8")
    return digests


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    """model.safetensors, or shards and their index."""
    split = shards(tensors, max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        # Experts are views of their stack: copied here, one shard at a time.
        shard = {key: torch.clone(tensors[key].detach()).cpu().contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        (folder / INDEX).write_text(shard_index(split), encoding="utf-8")


def _config(model: Any, original: Path | None) -> dict[str, Any]:
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
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = config.get("tie_word_embeddings", type(model.config)().tie_word_embeddings)
    if tied and getattr(head, "weight", None) is not embeddings.weight:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = model.config.quantization_config.to_dict()
    return config
