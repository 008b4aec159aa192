"""Rewrite a quantized checkpoint in another layout: the same codes, packed differently.

Modules are read, converted and written one at a time, and then put together: memory stays near the
size of one matrix, and the result takes its size twice on disk while it is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import shards
from llmq.errors import SchemeError
from llmq.formats import awq, columns, compressed_tensors, gptq
from llmq.hf.saving import COMPANIONS, assemble
from llmq.opened import Opened, open_checkpoint
from llmq.output import staged_folder, writing
from llmq.progress import progress_bar
from llmq.report import REPORT_FILE
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.superblocks import SuperBlockScheme

TARGETS = (compressed_tensors.METHOD, gptq.METHOD, awq.METHOD)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source, target: layouts, as in `TARGETS`.
        modules: how many packed modules were rewritten.
        rounded_scales: how many scales the target cannot hold exactly; 0 = nothing was lost.
        largest_change: of those scales, relative.
        notes: what to know about the result.
    """

    source: str
    target: str
    modules: int
    rounded_scales: int
    largest_change: float
    notes: tuple[str, ...]


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> Conversion:
    """Write a quantized checkpoint in another layout.

    Codes and zeros are kept as they are. Scales are too where the target's dtype holds them: GPTQ
    and AWQ store fp16, which holds nearly every bf16 scale that occurs; the result tells how many
    were rounded.

    Args:
        src: folder or Hub name of a compressed-tensors, GPTQ or AWQ checkpoint.
        out: folder to create; must be absent or empty.
        format: "compressed-tensors", "gptq" (version 1 if symmetric, else 2) or "awq".
        max_shard_bytes: of one safetensors file.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        SourceError, FormatError: `src` cannot be used.
        SchemeError: the format cannot hold what is there; says which could.
        OutputError: `out` is in the way or cannot be written.
    """
    if format not in TARGETS:
        raise SchemeError(f"format={format!r}: use one of {', '.join(TARGETS)}.")
    with staged_folder(out) as folder:
        opened = open_checkpoint(src)
        _check_holds(opened, format)
        config = _target_config(opened, format)
        write = _writer(opened, format)
        lost: list[tuple[int, float]] = []
        with writing(out):
            parts = _Parts(folder / "parts")
            for key in opened.dense():
                parts.add({key: opened.tensors[key]})
            with progress_bar("Converting", len(opened.schemes), show=progress) as advance:
                for done, name in enumerate(opened.schemes, 1):
                    q = opened.read(name)
                    if format != compressed_tensors.METHOD:
                        lost.append(columns.lossy_scales(q))
                    parts.add(write(name, q))
                    advance(done)
            assemble(parts.found, folder, max_shard_bytes)
            shutil.rmtree(parts.folder)
            _write_companions(opened, folder, config)
        return Conversion(
            opened.layout.method,
            format,
            len(opened.schemes),
            sum(count for count, _ in lost),
            max((change for _, change in lost), default=0.0),
            tuple(_notes(opened, format)),
        )


class _Parts:
    """Files with one module each, and where their tensors lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, shards.Entry] = {}
        folder.mkdir()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / f"{len(self.found)}.safetensors"
        shards.write(path, tensors)
        self.found |= shards.entries(path)


def _writer(opened: Opened, target: str) -> Callable[[str, QuantizedWeight], dict[str, Tensor]]:
    if target == gptq.METHOD:
        version = 1 if opened.symmetric else 2
        return lambda name, q: gptq.write(name, q, version)
    if target == awq.METHOD:
        return awq.write
    stored = opened.config.get("dtype") or opened.config.get("torch_dtype")
    dtype = getattr(torch, str(stored), None)

    def write(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
        tensors = compressed_tensors.write(name, q)
        scale = q.scale if dtype is None else q.scale.to(dtype)
        if torch.equal(scale.float(), q.scale.float()):
            tensors[f"{name}.weight_scale"] = scale
        return tensors

    return write


def _reason(opened: Opened, target: str) -> str | None:
    """Why `target` cannot hold this checkpoint; None if it can."""
    if target != compressed_tensors.METHOD and opened.embeddings:
        return f"{next(iter(opened.embeddings))}: it has no quantized embeddings"
    for name, scheme in opened.schemes.items():
        N, K = opened.layout.shape(name, opened.tensors, scheme)
        reason = None
        if target != compressed_tensors.METHOD:
            reason = (gptq if target == gptq.METHOD else awq).why_not(scheme, N, K)
        if target != gptq.METHOD and opened.layout.is_ordered(name, opened.tensors, scheme):
            reason = "its inputs are ordered by importance (desc_act)"
        if reason:
            return f"{name}: {reason}"
    if target == awq.METHOD:
        try:
            awq.config(opened.schemes, opened.dense_matrices())
        except SchemeError as error:
            return str(error).rstrip(".")
    return None


def _check_holds(opened: Opened, target: str) -> None:
    """Refuse what the target cannot hold, with what could.

    Raises:
        SchemeError: names the module.
    """
    for name, scheme in opened.schemes.items():
        if isinstance(scheme, SuperBlockScheme):
            raise SchemeError(
                f"{target} cannot hold {name}: it is in super-blocks ({scheme.kind}), which only "
                "GGUF has. Use --format gguf, or quantize the original again without --k-quants."
            )
    if reason := _reason(opened, target):
        others = [f for f in TARGETS if f != target and _reason(opened, f) is None]
        raise SchemeError(f"{target} cannot hold {reason}. Use --format {' or '.join(others)}.")


def _target_config(opened: Opened, target: str) -> dict[str, Any]:
    """The `quantization_config` of the result."""
    schemes, dense = opened.schemes, opened.dense_matrices()
    if target == gptq.METHOD:
        return gptq.config(schemes, dense, 1 if opened.symmetric else 2)
    if target == awq.METHOD:
        return awq.config(schemes, dense)
    if opened.layout.method == target:
        return opened.config["quantization_config"]
    most = columns.most_common(schemes)
    groups: dict[QuantScheme, list[str]] = {most: ["Linear"]}
    for name, scheme in schemes.items():
        if scheme != most:
            groups.setdefault(scheme, []).append(name)
    if schemes.get("lm_head") == most:
        groups[most].append("re:.*lm_head")
    head = [] if "lm_head" in schemes else ["lm_head"]
    return compressed_tensors.config(groups, [*dense, *head])


def _notes(opened: Opened, target: str) -> Iterator[str]:
    if target == gptq.METHOD and not opened.symmetric:
        yield "asymmetric GPTQ (version 2): GPTQModel and llmq load it, vLLM and SGLang refuse it"
    if any(".experts." in name for name in opened.schemes) and target != compressed_tensors.METHOD:
        yield "stock transformers leaves GPTQ and AWQ experts random; llmq and engines load them"


def _write_companions(opened: Opened, folder: Path, config: Mapping[str, Any]) -> None:
    """Everything but weights."""
    patterns = (*COMPANIONS, REPORT_FILE)
    for path in sorted({p for glob in patterns for p in opened.folder.glob(glob)}):
        if path.is_file():
            target = folder / path.relative_to(opened.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    whole = opened.config | {"quantization_config": config}
    files = {"config.json": whole}
    if config["quant_method"] == gptq.METHOD:
        files["quantize_config.json"] = dict(config)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
