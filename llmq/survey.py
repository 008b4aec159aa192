"""Before a model is quantized: `plan` a run, `sensitivity` of its layers, `write` text for it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq import plan as planning
from llmq.adapters import widened
from llmq.calibrate import token_stream
from llmq.errors import CalibrationError, OutputError
from llmq.hf.outline import outline
from llmq.inputs import SEQ_LEN, read_calibration, window_length, windows_for
from llmq.ladder import DEFAULT, QUALITIES, chosen, in_scheme, with_plain_rows, with_tuning
from llmq.mixing import common_format, is_mixed, scan
from llmq.outlook import job
from llmq.output import enough_memory, staged_file, writing
from llmq.plan import Plan, Problem
from llmq.scheme import QuantScheme
from llmq.sensitivity import Sensitivity
from llmq.source import (
    check_path,
    open_config,
    open_model,
    open_original,
    open_tokenizer,
    pick_device,
    source_headers,
)
from llmq.text import Source
from llmq.writing import documents_of


def plan(
    src: str | os.PathLike[str],
    *,
    quality: str | None = None,
    method: str | None = None,
    bits: float = 4,
    mixed: bool = False,
    group_size: int = 128,
    symmetric: bool = True,
    samples: int = 128,
    seq_len: int | None = None,
    lm_head: bool = False,
    embeddings: int | None = None,
    tune_scales: int | None = None,
    codebook: str | None = None,
    outliers: float = 0.0,
    k_quants: bool = False,
    skip: Sequence[str] = (),
    processes: int = 1,
    tensor_parallel: Sequence[int] = (1,),
    activations: str = "memory",
    device: str = "auto",
    out: str | os.PathLike[str] = ".",
) -> Plan:
    """What `quantize` would write and take, and who would load it, before a weight is read.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        quality, method, bits, mixed, group_size, symmetric, samples, seq_len, lm_head, embeddings,
            tune_scales, codebook, outliers, k_quants, skip, activations, device: as for `quantize`.
            The size at an average of bits is an estimate.
        processes: that torchrun shall start; memory is that of each of them.
        tensor_parallel: numbers of GPUs that shall share the result.
        out: where it shall be written; its disk is asked for room.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    method, recipe = chosen(method, quality)
    scheme = common_format(bits, mixed, group_size, symmetric, codebook, outliers, k_quants)
    recipe = dataclasses.replace(
        in_scheme(recipe, scheme), skip=tuple(skip), lm_head=lm_head, embeddings=embeddings
    )
    recipe = with_tuning(recipe, bits, mixed, tune_scales)
    where = pick_device(device)
    name, config = open_original(src)
    average = float(bits) if is_mixed(bits, mixed) else None
    seq_len = window_length(config, seq_len, SEQ_LEN)
    windows = -(-windows_for(method, samples) // processes)
    lean, mix = activations == "disk", average is not None
    headers, line = source_headers(name), None
    if k_quants:
        model = outline(config, planning.model_dtype(config, headers))
        recipe, line = with_plain_rows(recipe, model)
    found = planning.make(
        name,
        config,
        headers,
        recipe,
        ranks=tensor_parallel,
        out=out,
        job=job(recipe, windows, seq_len, lean, mix, where, processes),
        device=where,
        average=average,
    )
    if line is None:
        return found
    note = Problem("K-quants", line, "nothing, or leave --k-quants away", False)
    return dataclasses.replace(found, problems=(note, *found.problems))


def sensitivity(
    src: str | os.PathLike[str],
    *,
    group_size: int = 128,
    symmetric: bool = True,
    calibration: Source | None = None,
    samples: int = 32,
    seq_len: int | None = None,
    skip: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    join: str = "documents",
    bos: bool | None = None,
) -> list[Sensitivity]:
    """What rounding each layer to 2, 3, 4, 5, 6 or 8 bits is predicted to cost the whole model.

    With the default quality. One backward pass over 32 windows at most, with the whole model on
    `device`.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        group_size, symmetric, calibration, samples, seq_len, skip, device, seed, join, bos: as for
            `quantize`.

    Returns:
        one entry for the layers that read one tensor (they share a width), in execution order.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    scheme = QuantScheme(4, group_size, symmetric)
    recipe = dataclasses.replace(QUALITIES[DEFAULT], scheme=scheme, skip=tuple(skip))
    name, config = open_original(src)
    text = read_calibration(
        calibration,
        open_tokenizer(name),
        config,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        join=join,
        bos=bos,
    )
    return scan(name, text.windows, recipe, pick_device(device), seed)


def write(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: int = 128,
    seq_len: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Let a model write text to calibrate it on, see `llmq.writing`.

    Args:
        src: folder or Hub name of a causal language model; the whole of it must fit into memory,
            in float32 on CPUs that are slow with less.
        out: .jsonl file to create, one object with `text` per line.
        samples, seq_len: windows of text that `quantize` shall find in it, and their length
            (default: 512, or the model's context if that is shorter).
        temperature: 1 = the model's own distribution; less is more of the same.
        seed: of the draws. The same seed gives the same text on the same machine.
        device: "auto" = the GPU if there is one.
        progress: show a progress bar on a terminal.

    Returns:
        documents, tokens.

    Raises:
        LlmqError: see `llmq.errors`; there is no file then.
    """
    target = Path(out).expanduser()
    if samples < 1:
        raise CalibrationError(f"samples={samples}: at least 1 window is needed.")
    if target.suffix != ".jsonl":
        raise OutputError(f"{out}: texts are written as .jsonl; give a name that ends so.")
    if target.exists():
        raise OutputError(f"{out}: a file with this name exists. Choose another name.")
    name, where = check_path(src), pick_device(device)
    tokenizer = open_tokenizer(name)
    length = window_length(open_config(name), seq_len, SEQ_LEN)
    with staged_file(out) as stage, enough_memory():
        found = documents_of(
            widened(open_model(name, where)),
            tokenizer,
            tokens=(samples + 1) * length,  # one more judges what is made of the others
            length=length,
            temperature=temperature,
            seed=seed,
            show=progress,
        )
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found]
        with writing(out):
            stage.write_text("".join(lines), encoding="utf-8")
    return {"documents": len(found), "tokens": len(token_stream(found, tokenizer)[0])}
