"""A quantized checkpoint as one GGUF file for llama.cpp: blocks, metadata and tokenizer.

For llama, mistral, qwen2 and qwen3. Weights are written from their codes (`formats.gguf`), one
matrix at a time. Needs the package `gguf` (pip install 'llmq-quant[gguf]').
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq.convert import Conversion, Opened, open_checkpoint
from llmq.errors import OutputError, SchemeError
from llmq.formats import gguf as layout
from llmq.formats.columns import lossy_scales
from llmq.output import staged_folder, writing
from llmq.progress import progress_bar
from llmq.source import open_tokenizer

# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How a tokenizer splits text before merging -> llama.cpp's name for it. None: ByteLevel alone.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    None: "gpt-2",
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
FILE = "model.gguf"


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: its GGUF type, its shape in bytes or elements, and how to make it."""

    name: str
    kind: str
    shape: tuple[int, int] | tuple[int]
    make: Callable[[], np.ndarray]


def write_gguf(src: str | Path, out: str | Path, *, progress: bool = False) -> Conversion:
    """Write `out`/model.gguf from a quantized checkpoint.

    Matrices that are not quantized, embeddings and output layer among them, are written in fp16,
    norms and biases in fp32.

    Args:
        src: folder or Hub name of a compressed-tensors, GPTQ or AWQ checkpoint.
        out: folder to create; must be absent or empty.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        SourceError, FormatError: `src` cannot be used.
        SchemeError: an architecture, tokenizer or scheme that has no place in GGUF or in llmq.
        OutputError: `out` is in the way, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise OutputError("GGUF needs a package: pip install 'llmq-quant[gguf]'.") from error
    with staged_folder(out) as folder:
        opened = open_checkpoint(src)
        _check(opened)
        arch = ARCHITECTURES[opened.config["model_type"]]
        writer = gguf.GGUFWriter(None, arch)
        _add_metadata(writer, opened.config, arch, Path(src).name)
        _add_tokenizer(writer, gguf.TokenType, opened)
        counts: dict[str, int] = {}
        lost: list[tuple[int, float]] = []
        entries = list(_entries(opened, gguf, arch, lost))
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            element = {"F32": np.float32, "F16": np.float16}.get(entry.kind, np.uint8)
            size = int(np.prod(entry.shape)) * np.dtype(element).itemsize
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(element), size, kind)
            if entry.kind.startswith("Q"):
                counts[entry.kind] = counts.get(entry.kind, 0) + 1
        most = max(counts, key=lambda kind: counts[kind])
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        with writing(out), progress_bar("Writing", len(entries), show=progress) as advance:
            writer.write_header_to_file(folder / FILE)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, entry in enumerate(entries, 1):
                writer.write_tensor_data(entry.make())
                advance(done)
            writer.close()
        return Conversion(
            opened.layout.method,
            "gguf",
            len(opened.schemes),
            sum(count for count, _ in lost),
            max((change for _, change in lost), default=0.0),
            tuple(_notes(opened, counts)),
        )


def _check(opened: Opened) -> None:
    """Refuse what has no place in GGUF.

    Raises:
        SchemeError: says what.
    """
    family = opened.config.get("model_type")
    if family not in ARCHITECTURES:
        raise SchemeError(
            f"model_type={family!r}: llmq writes GGUF for {', '.join(ARCHITECTURES)}. "
            "Use --format compressed-tensors, gptq or awq."
        )
    for name, scheme in opened.schemes.items():
        reason = layout.why_not(scheme, *opened.layout.shape(name, opened.tensors, scheme))
        if opened.layout.is_ordered(name, opened.tensors, scheme):
            reason = "its inputs are ordered by importance (desc_act)"
        if reason:
            raise SchemeError(f"GGUF cannot hold {name}: {reason}. Use --format gptq.")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """theta, type and factor of the rotary embedding, old or new style of config.json."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear"):
        raise SchemeError(f"rope_type={rope['rope_type']!r}: llmq writes GGUF without it only.")
    return rope


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_metadata(writer: Any, config: Mapping[str, Any], arch: str, name: str) -> None:
    """What llama.cpp must know about the model."""
    head, rope = _head_dim(config), _rope(config)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head)
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokenizer(writer: Any, kinds: Any, opened: Opened) -> None:
    """The vocabulary, merges and special tokens of a byte-level BPE tokenizer.

    Raises:
        SchemeError: a tokenizer of another kind.
    """
    tokenizer = open_tokenizer(str(opened.folder))
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    count = opened.config["vocab_size"]
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    tokens, types = [], []
    for index in range(count):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(kinds.UNUSED)
        elif index in added:
            types.append(kinds.CONTROL if added[index] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(parts))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = parts["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for special in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{special}_token_id")) is not None:
            getattr(writer, f"add_{special}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _splitter(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text.

    Raises:
        SchemeError: llmq does not know the name.
    """
    before = parts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    known = [s.get("type") in ("Split", "ByteLevel") for s in steps]
    pattern = patterns[0] if patterns else None
    byte_level = parts["model"]["type"] == "BPE" and steps[-1].get("type") == "ByteLevel"
    if not (byte_level and all(known) and len(patterns) < 2 and pattern in SPLITTERS):
        raise SchemeError(
            "tokenizer.json: llmq writes GGUF for byte-level BPE tokenizers that split text as "
            "GPT-2, Llama 3 or Qwen 2 do, and this one does not. Convert the full-precision model "
            "with llama.cpp's own convert_hf_to_gguf.py."
        )
    return SPLITTERS[pattern]


def _entries(
    opened: Opened, gguf: Any, arch: str, lost: list[tuple[int, float]]
) -> Iterator[_Entry]:
    """Every tensor of the file; making one notes in `lost` what fp16 scales cost."""
    config = opened.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }

    def rows(module: str, count: int) -> Tensor | None:
        leaf = module.rpartition(".")[2]
        return layout.rope_rows(count, heads[leaf]) if arch == "llama" and leaf in heads else None

    def named(key: str) -> str:
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SchemeError(f"{key}: has no name in GGUF's {arch!r}.")
        return found

    def packed(module: str, order: Tensor | None) -> np.ndarray:
        q = opened.read(module)
        lost.append(lossy_scales(q))
        if order is not None:
            q = replace(q, codes=q.codes[order], scale=q.scale[order], zero=q.zero[order])
        return layout.blocks(q)

    def dense(key: str, order: Tensor | None) -> np.ndarray:
        tensor = opened.tensors[key]
        tensor = tensor if order is None else tensor[order]
        return tensor.to(torch.float16 if tensor.ndim == 2 else torch.float32).numpy()

    for key in opened.dense():
        shape = opened.tensors.shape(key)
        order = rows(key.rpartition(".")[0], shape[0])
        kind = "F16" if len(shape) == 2 else "F32"
        yield _Entry(named(key), kind, shape, lambda key=key, order=order: dense(key, order))  # type: ignore[arg-type]
    for module, scheme in opened.schemes.items():
        N, K = opened.layout.shape(module, opened.tensors, scheme)
        kind, order = layout.block_type(scheme), rows(module, N)
        yield _Entry(
            named(f"{module}.weight"),
            kind,
            (N, K // layout.WIDTH * layout.BYTES[kind]),
            lambda module=module, order=order: packed(module, order),
        )


def _notes(opened: Opened, counts: Mapping[str, int]) -> Iterator[str]:
    yield ", ".join(f"{count} matrices in {kind}" for kind, count in counts.items())
    if "Q4_1" in counts:
        yield "Q4_1 rounds -zero * scale to float16: weights move by 2**-11 of that at most"
    window = opened.config.get("sliding_window")
    if window and opened.config["model_type"] == "mistral":
        yield f"llama.cpp attends beyond the sliding window of {window} tokens"
    if any(scheme.bits < 4 for scheme in opened.schemes.values()):
        yield "2 and 3 bits are stored in blocks of 4 bits: exact, but no smaller"
