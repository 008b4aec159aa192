"""A quantized checkpoint as one GGUF file for llama.cpp: blocks, metadata and tokenizer.

For llama, mistral, qwen2 and qwen3. Weights are written from their codes (`formats.gguf`), one
matrix at a time. Needs the package `gguf` (pip install 'llmq-quant[gguf]').
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llmq.convert import Conversion
from llmq.errors import OutputError, SchemeError
from llmq.formats import bytewise, gguf as layout
from llmq.formats.columns import lossy_scales
from llmq.formats.compressed_tensors import SUFFIXES
from llmq.gguf_metadata import (
    ARCHITECTURES,
    add_model,
    add_tokenizer,
    key_value_heads,
    rope_factors,
)
from llmq.opened import Opened, open_checkpoint
from llmq.output import staged_folder, writing
from llmq.progress import progress_bar
from llmq.source import open_config, open_tokenizer

FILE = "model.gguf"
Embeddings = Literal["f16", "q8_0", "q6_k"]
_EMBEDDINGS = ("token_embd.weight", "output.weight")
# llama.cpp's name for a file most matrices of which are of a type
_FILE_TYPES = {"Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: its GGUF type, its shape in bytes or elements, and how to make it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclass
class _Losses:
    """What was lost so far: scales that fp16 rounded, and relative changes of whole matrices."""

    scales: list[tuple[int, float]] = field(default_factory=list)
    matrices: list[float] = field(default_factory=list)


def write_gguf(
    src: str | Path,
    out: str | Path,
    *,
    embeddings: Embeddings = "f16",
    k_quants: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write `out`/model.gguf from a quantized checkpoint.

    Norms and biases are written in fp32, other matrices that are not quantized in fp16.

    Args:
        src: folder or Hub name of a compressed-tensors, GPTQ or AWQ checkpoint.
        out: folder to create; must be absent or empty.
        embeddings: type of the embeddings, and of the output layer if it is not quantized: "f16",
            or rounded to nearest in "q8_0" (8.5 bits per weight) or "q6_k" (6.6).
        k_quants: store 2 bits, symmetric 3, asymmetric 4 and 5 bits in Q2_K to Q5_K: smaller,
            codes as they are, scales rounded (see `formats.kquants`). What was quantized with
            `k_quants` is in them already and stays as it is.
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
    if embeddings not in get_args(Embeddings):
        raise SchemeError(f"embeddings={embeddings!r}: use {', '.join(get_args(Embeddings))}.")
    with staged_folder(out) as folder:
        opened = open_checkpoint(src)
        _check(opened, embeddings)
        arch = ARCHITECTURES[opened.config["model_type"]]
        writer = gguf.GGUFWriter(None, arch)
        add_model(writer, opened.config, Path(src).name)
        tokenizer = open_tokenizer(str(opened.folder))
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        notes = add_tokenizer(writer, tokenizer, parts, opened.config["vocab_size"])
        lost = _Losses()
        entries = list(_entries(opened, gguf, embeddings, k_quants, lost))
        counts = _announce(writer, entries, gguf)
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
            sum(count for count, _ in lost.scales),
            max((change for _, change in lost.scales), default=0.0),
            (*_notes(opened, counts, lost, embeddings), *notes),
        )


def _announce(writer: Any, entries: list[_Entry], gguf: Any) -> dict[str, int]:
    """Tell `writer` of all tensors to come, before any is made; how many there are of each Q."""
    counts: dict[str, int] = {}
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        element = {"F32": np.float32, "F16": np.float16}.get(entry.kind, np.uint8)
        size = int(np.prod(entry.shape)) * np.dtype(element).itemsize
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(element), size, kind)
        if entry.kind.startswith("Q"):
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
    most = max(counts, key=lambda kind: counts[kind])
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return counts


def _check(opened: Opened, embeddings: Embeddings) -> None:
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
    width, hidden = 256 if embeddings == "q6_k" else 32, opened.config["hidden_size"]
    if embeddings != "f16" and hidden % width:
        raise SchemeError(
            f"embeddings={embeddings!r}: hidden_size={hidden} is not divisible by {width}. Use "
            f"{'q8_0 or f16' if hidden % 32 == 0 else 'f16'}."
        )
    for name, scheme in opened.schemes.items():
        reason = layout.why_not(scheme, *opened.layout.shape(name, opened.tensors, scheme))
        if opened.layout.is_ordered(name, opened.tensors, scheme):
            reason = "its inputs are ordered by importance (desc_act)"
        if reason:
            raise SchemeError(f"GGUF cannot hold {name}: {reason}. Use --format gptq.")


def _entries(
    opened: Opened, gguf: Any, embeddings: Embeddings, k_quants: bool, lost: _Losses
) -> Iterator[_Entry]:
    """Every tensor of the file; making one notes in `lost` what it costs."""
    config = opened.config
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": key_value_heads(config)}

    def rows(module: str, count: int) -> Tensor | None:
        leaf = module.rpartition(".")[2]
        return layout.rope_rows(count, heads[leaf]) if arch == "llama" and leaf in heads else None

    def named(key: str) -> str:
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SchemeError(f"{key}: has no name in GGUF's {arch!r}.")
        return found

    def packed(module: str, kind: layout.BlockType, order: Tensor | None) -> np.ndarray:
        q = opened.read(module)
        if order is not None:
            q = q.rows(order)
        found, change = layout.blocks(q, kind)
        lost.matrices.append(change)
        if not change:
            lost.scales.append(lossy_scales(q))
        return found

    def dense(key: str, kind: str, order: Tensor | None) -> np.ndarray:
        tensor, name = opened.tensors[key], key.removesuffix(".weight")
        if scheme := opened.embeddings.get(name):
            tensor = bytewise.read(name, opened.tensors, scheme).dequantize()
        tensor = tensor if order is None else tensor[order]
        if kind == "Q6_K" or kind == "Q8_0":
            return layout.rounded(tensor.float(), kind)
        return tensor.to({"F16": torch.float16, "F32": torch.float32}[kind]).numpy()

    if (factors := rope_factors(open_config(str(opened.folder)), arch)) is not None:
        yield _Entry("rope_freqs.weight", "F32", factors.shape, lambda: factors)
    parts = {f"{n}.{suffix}" for n in opened.embeddings for suffix in SUFFIXES}
    for key in opened.dense():
        if key in parts:
            continue
        name, shape = named(key), opened.tensors.shape(key)
        order = rows(key.rpartition(".")[0], shape[0])
        kind = "F16" if len(shape) == 2 else "F32"
        if name in _EMBEDDINGS and embeddings != "f16":
            kind = embeddings.upper()
            shape = (shape[0], layout.row_bytes(kind, shape[1]))  # type: ignore[arg-type]
        yield _Entry(name, kind, shape, lambda k=key, t=kind, o=order: dense(k, t, o))  # type: ignore[misc]
    for module, scheme in opened.schemes.items():
        N, K = opened.layout.shape(module, opened.tensors, scheme)
        kind, order = layout.block_type(scheme, K, k_quants), rows(module, N)
        yield _Entry(
            named(f"{module}.weight"),
            kind,
            (N, layout.row_bytes(kind, K)),
            lambda m=module, t=kind, o=order: packed(m, t, o),  # type: ignore[misc]
        )


def _notes(
    opened: Opened, counts: Mapping[str, int], lost: _Losses, embeddings: Embeddings
) -> Iterator[str]:
    yield ", ".join(f"{count} matrices in {kind}" for kind, count in counts.items())
    if opened.embeddings:
        yield f"embeddings were quantized; their values are in {embeddings} now"
    if embeddings == "f16":
        yield "what is not quantized is in float16, norms and biases in float32"
    else:
        yield f"embeddings, and the head if it is not quantized, are rounded to {embeddings}"
    for kind in counts.keys() & {"Q4_1", "Q5_1"}:
        yield f"{kind} rounds -zero * scale to float16: weights move by 2**-11 of that at most"
    if changed := [change for change in lost.matrices if change]:
        yield (
            f"K-quants rounded the scales of {len(changed)} matrices, which moved by "
            f"{max(changed):.2%} at most (codes are as they were)"
        )
    window = opened.config.get("sliding_window")
    if window and opened.config["model_type"] == "mistral":
        yield f"llama.cpp attends beyond the sliding window of {window} tokens"
    if "Q4_0" in counts and any(scheme.bits < 4 for scheme in opened.schemes.values()):
        yield "2 and 3 bits are stored in blocks of 4 bits: exact, but no smaller"
    if "Q8_0" in counts and any(scheme.bits == 6 for scheme in opened.schemes.values()):
        yield "6 bits are stored in blocks of 8 bits: exact, but no smaller"
