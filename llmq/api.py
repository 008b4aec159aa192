"""The verbs of llmq: `quantize` a model into a folder, `load` one, and others.

The command line is a thin shell over these functions, those of `survey`, which stand here too, and
those of `measure`; options have the same names and defaults.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from llmq import hf, ranks
from llmq.adapters import widened
from llmq.errors import SchemeError
from llmq.hf.saving import original_folder
from llmq.hf.streaming import StoredModel
from llmq.inputs import read_calibration, windows_for
from llmq.journal import Workplace, workplace
from llmq.ladder import chosen, in_scheme, with_plain_rows, with_tuning
from llmq.mixing import allocated, average_for_size, common_format, is_mixed, parse_size
from llmq.origin import command, origin, public_name
from llmq.pipeline import Run, begin, outcome, preflight, publish, solve
from llmq.sensitivity import WIDTHS
from llmq.source import (
    check_path,
    open_config,
    open_model,
    open_original,
    open_tokenizer,
    pick_device,
    source_headers,
)
from llmq.survey import plan, sensitivity, write
from llmq.text import Source

__all__ = ["correct", "load", "plan", "quantize", "sensitivity", "write"]


def quantize(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quality: str | None = None,
    method: str | None = None,
    bits: float = 4,
    mixed: bool = False,
    target_size: int | str | None = None,
    widths: Sequence[int] = WIDTHS,
    group_size: int = 128,
    symmetric: bool = True,
    calibration: Source | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    lm_head: bool = False,
    embeddings: int | None = None,
    tune_scales: int | None = None,
    codebook: str | None = None,
    outliers: float = 0.0,
    k_quants: bool = False,
    skip: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    join: str = "documents",
    bos: bool | None = None,
    activations: str = "memory",
    fresh: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Quantize a model and write it to a folder that transformers, vLLM and others load.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        out: folder to create; it must be absent or empty.
        quality: "fast", "balanced" (the default) or "best", see `llmq.ladder`.
        method: instead of a quality, "rtn", "gptq", "awq" or "awq+gptq".
        bits, group_size, symmetric: the number format, see `QuantScheme`. Bits that are no whole
            number are an average: layers get 2, 3, 4, 5, 6 or 8, and larger groups than
            `group_size` where bits for codes are worth more than scales, in the same number of
            bytes; see `sensitivity`.
        mixed: `bits` is an average even if it is a whole number.
        target_size: instead of bits, what the files of weights may take: bytes, or "500MB".
        widths: that an average is made of; engines other than llmq read 4 and 8.
        calibration: text like that which the model will see, see `llmq.text` and `write`; None = a
            little public-domain text that comes with llmq.
        samples: windows of calibration text.
        seq_len: tokens per window (default: 512, or the model's context if that is shorter).
        lm_head: quantize the output layer too. Where it shares the embeddings' weight, it gets its
            own.
        embeddings: 8 = round the input embeddings to nearest, one byte per weight; None = they
            stay as they are. Engines other than transformers do not read them.
        tune_scales: steps of tuning all scales together in the end, which holds the whole packed
            model in memory (see `llmq.tuning`); 0 = none, None = as the quality has it: 240 with
            best, 90 with balanced below 3 bits or at 3 on average.
        codebook: "nf4" or "learned" (a table per row) instead of integers, see `llmq.codebook`;
            only llmq loads the result.
        outliers: with a code book: share of every row's weights that is kept beside it.
        k_quants: solve in the super-blocks of llama.cpp, Q2_K to Q6_K by `bits`, which
            `llmq convert --format gguf` then writes as they are, see `llmq.superblocks`. Group
            size and symmetry are those of the kind. Matrices whose rows are no multiple of 256
            get 4 symmetric bits in groups of 32 (5 with 5 bits, 8 with 6).
        skip: patterns of linears to leave in full precision: a module name or the end of one,
            with shell wildcards ("down_proj", "model.layers.0.*").
        device: where blocks are calibrated and solved; "auto" = the GPU if there is one.
        seed: which windows of the text are used.
        join: "wikitext" if `calibration` is a raw file of wikitext.
        bos: start windows with BOS; None = if the tokenizer does so on its own.
        activations: "memory", or "disk" to keep the calibration's hidden states in files.
        fresh: forget an unfinished run into `out`; without it, that run is continued.
        progress: show a bar on standard error if that is a terminal.
        tell: is called with one line before the work begins: size, memory and time, estimated.

    Returns:
        what was also written to quantization_report.json: settings, one entry per matrix,
        bits_per_weight, seconds, peak_memory_bytes.

    Raises:
        LlmqError: see `llmq.errors`; nothing is left at `out` then. Once blocks are finished, they
            are kept in a hidden folder beside it, and the same call continues with them.
    """
    given, start = dict(locals()), time.perf_counter()
    if activations not in ("memory", "disk"):
        raise SchemeError(f"activations={activations!r}: use memory or disk.")
    method, recipe = chosen(method, quality)
    mixed = mixed or target_size is not None
    scheme = common_format(bits, mixed, group_size, symmetric, codebook, outliers, k_quants)
    recipe = dataclasses.replace(
        in_scheme(recipe, scheme), skip=tuple(skip), lm_head=lm_head, embeddings=embeddings
    )
    where = pick_device(device)
    ranks.join(where)
    with workplace(out, fresh) if ranks.number() == 0 else nullcontext(Workplace(out)) as work:
        name, config = open_original(src)
        text = read_calibration(
            calibration,
            open_tokenizer(name),
            config,
            samples=windows_for(method, samples),
            seq_len=seq_len,
            seed=seed,
            join=join,
            bos=bos,
        )
        if target_size is not None:
            headers = source_headers(name)
            bits = average_for_size(parse_size(target_size), name, config, headers, recipe)
        recipe = with_tuning(recipe, bits, mixed, tune_scales)
        source, kl = StoredModel(original_folder(name)), None
        recipe, line = with_plain_rows(recipe, source.model)
        if line and tell and ranks.number() == 0:
            tell(line)
        average = float(bits) if is_mixed(bits, mixed) else None
        run = Run(name, config, source, method, recipe, text, where, work, activations == "disk")
        preflight(run, average, tell)
        if average is not None:
            recipe, kl = allocated(recipe, bits, widths, name, text.windows, where, seed)
            run = dataclasses.replace(run, recipe=recipe)
        if report := begin(run):
            return report
        solved = solve(run, show=progress)
        if solved is None:  # another process writes
            return ranks.of_the_first(None)
        report = {
            **origin(name, config),
            "command": command(quantize, given),
            "method": method,
            "bits": bits if bits % 1 else int(bits),
            "predicted_kl": kl,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            "lm_head": lm_head,
            "embeddings": embeddings,
            "tune_scales": tune_scales,
            "codebook": codebook,
            "outliers": outliers,
            "k_quants": getattr(scheme, "kind", None),
            "skip": list(skip),
            "calibration": text.told,
            "seconds": time.perf_counter() - start,
            **outcome(run, solved),
        }
        publish(work, report, solved.digests)
    return ranks.of_the_first(report)


def correct(
    original: str | os.PathLike[str],
    quantized: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 32,
    calibration: Source | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    device: str = "auto",
) -> Path:
    """Write a low-rank correction of a quantized model as a LoRA adapter, see `llmq.correction`.

    Args:
        original: the full-precision model: folder or Hub name.
        quantized: what was made of it.
        out: folder to create.
        rank: of the correction.
        calibration, samples, seq_len: as for `quantize`.
        device: "auto" = the GPU if there is one.

    Raises:
        LlmqError: see `llmq.errors`; nothing is left at `out` then.
    """
    from llmq import correction  # needs the package peft

    name, where = check_path(quantized), pick_device(device)
    text = read_calibration(
        calibration, open_tokenizer(name), open_config(name), samples=samples, seq_len=seq_len
    )
    full, packed = (widened(open_model(n, where)) for n in (check_path(original), name))
    return correction.correct(
        full, packed, text.windows, Path(out), rank=rank, base_model=public_name(name)
    )


def load(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A model of transformers, ready to use; weights that are packed on disk stay packed.

    Args:
        path: folder or Hub name, quantized by llmq or any tool that writes compressed-tensors.
        **kwargs: passed on to `hf.load` (`backend`, `fuse`, `head_bits`) and `from_pretrained`.
    """
    return hf.load(check_path(path), **kwargs)
