"""What is asked before a model is quantized: `plan` a run, `sensitivity` of its layers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from llmq import plan as planning
from llmq.hf.outline import outline
from llmq.inputs import SEQ_LEN, read_calibration, window_length, windows_for
from llmq.ladder import DEFAULT, QUALITIES, chosen, in_scheme, with_plain_rows, with_tuning
from llmq.mixing import common_format, is_mixed, scan
from llmq.outlook import job
from llmq.plan import Plan, Problem
from llmq.scheme import QuantScheme
from llmq.sensitivity import Sensitivity
from llmq.source import open_original, open_tokenizer, pick_device, source_headers
from llmq.text import Source


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
