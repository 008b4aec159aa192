"""The three verbs of llmq: `quantize` a model into a folder, `evaluate` one, `load` one.

The command line is a thin shell over these functions; options have the same names and defaults.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import llmq
from llmq import demo, hf, plan as planning, ranks
from llmq.calibrate import adds_bos
from llmq.errors import CalibrationError, FormatError, SchemeError, SourceError
from llmq.evaluate import Evaluation, evaluate as measure
from llmq.gate import Gate
from llmq.harness import check_installed, run_tasks
from llmq.hf.saving import original_folder
from llmq.hf.streaming import StoredModel
from llmq.inputs import calibration_windows, check_vocabulary, identity, share
from llmq.journal import Workplace, workplace
from llmq.ladder import chosen
from llmq.mixing import average_for_size, is_mixed, parse_size, scan, uniform_width
from llmq.objective import HELD_OUT
from llmq.origin import command, origin, public_name
from llmq.output import enough_memory, writing
from llmq.plan import Plan
from llmq.progress import progress_bar
from llmq.protocols import PROTOCOLS, WIKITEXT2, read_windows
from llmq.quantize import (
    LayerReport,
    Recipe,
    check_experts,
    check_groups,
    quantizable,
    quantize as run,
)
from llmq.report import (
    REPORT_FILE,
    add_evaluation,
    expert_coverage,
    layer_entry,
    peak_memory_bytes,
    read_report,
    write_report,
)
from llmq.scheme import QuantScheme
from llmq.sensitivity import WIDTHS, Sensitivity, allocation, predicted
from llmq.source import (
    check_path,
    context_length,
    full_precision,
    open_config,
    open_model,
    open_tokenizer,
    pick_device,
    source_headers,
)
from llmq.stored import bits_per_weight, inspect_checkpoint
from llmq.stream import Streamed, stack_name
from llmq.text import Source, describe
from llmq.verify import check, fingerprint, seal

_RTN_SAMPLES = 8  # rounding needs no text; these only measure the error that it made
_BATCH_TOKENS = 2048


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
    skip: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    join: str = "documents",
    bos: bool | None = None,
    activations: str = "memory",
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Quantize a model and write it to a folder that transformers, vLLM and others load.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        out: folder to create; it must be absent or empty.
        quality: "fast" or "balanced" (the default), see `llmq.ladder`.
        method: instead of a quality, "rtn", "gptq", "awq" or "awq+gptq".
        bits, group_size, symmetric: the number format, see `QuantScheme`. Bits that are no whole
            number are an average: layers get 2, 3, 4 or 8, see `sensitivity`.
        mixed: `bits` is an average even if it is a whole number.
        target_size: instead of bits, what the files of weights may take: bytes, or "500MB".
        widths: that an average is made of; engines other than llmq read 4 and 8.
        calibration: text like that which the model will see, see `llmq.text`; None = a little
            public-domain text that comes with llmq.
        samples: windows of calibration text.
        seq_len: tokens per window (default: 512, or the model's context if that is shorter).
        lm_head: quantize the output layer too; the embeddings stay as they are.
        skip: patterns of linears to leave in full precision: a module name or the end of one,
            with shell wildcards ("down_proj", "model.layers.0.*").
        device: where blocks are calibrated and solved; "auto" = the GPU if there is one.
        seed: which windows of the text are used.
        join: "wikitext" if `calibration` is a raw file of wikitext.
        bos: start windows with BOS; None = if the tokenizer does so on its own.
        activations: "memory", or "disk" to keep the calibration's hidden states in files.
        fresh: forget an unfinished run into `out`; without it, that run is continued.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        what was also written to quantization_report.json: settings, one entry per matrix,
        bits_per_weight, seconds, peak_memory_bytes.

    Raises:
        LlmqError: see `llmq.errors`; nothing is left at `out` then. Once blocks are finished, they
            are kept in a hidden folder beside it, and the same call continues with them.
    """
    given = dict(locals())
    start = time.perf_counter()
    method, recipe = chosen(method, quality)
    mixed = mixed or target_size is not None
    scheme = QuantScheme(uniform_width(bits, mixed), group_size, symmetric)
    recipe = dataclasses.replace(recipe, scheme=scheme, skip=tuple(skip), lm_head=lm_head)
    if activations not in ("memory", "disk"):
        raise SchemeError(f"activations={activations!r}: use memory or disk.")
    where = pick_device(device)
    ranks.join(where)
    with workplace(out, fresh) if ranks.number() == 0 else nullcontext(Workplace(out)) as work:
        name = check_path(src)
        config = full_precision(open_config(name), name)
        tokenizer = open_tokenizer(name)
        seq_len = _window_length(config, seq_len, 512)
        bos = adds_bos(tokenizer) if bos is None else bos
        windows, judge, held_out = calibration_windows(
            calibration,
            tokenizer,
            config,
            samples=min(samples, _RTN_SAMPLES) if method == "rtn" else samples,
            seq_len=seq_len,
            seed=seed,
            join=join,
            bos=bos,
        )
        if target_size is not None:
            headers = source_headers(name)
            bits = average_for_size(parse_size(target_size), name, config, headers, recipe)
        kl = None
        if is_mixed(bits, mixed):
            units = scan(name, windows, recipe, where, seed)
            chosen_bits = allocation(units, bits, widths)
            schemes = {n: QuantScheme(b, group_size, symmetric) for n, b in chosen_bits.items()}
            recipe, kl = dataclasses.replace(recipe, schemes=schemes), predicted(units, chosen_bits)
        source = StoredModel(original_folder(name))
        names = quantizable(source.model, lm_head)
        check_groups(names, recipe)
        check_experts(source.model, recipe)
        if not any(recipe.scheme_for(n) for n in names):
            raise SchemeError(f"skip={list(skip)}: nothing is left to quantize.")
        mine = share(windows, recipe)
        if ranks.number() == 0:
            work.begin(identity(source, recipe, method, windows, judge, where))
        journal = work.journal = ranks.of_the_first(getattr(work, "journal", None))
        if journal.complete and (report := read_report(work.result)):
            if ranks.number() == 0:
                work.publish()
            return report
        with enough_memory():
            gate = Gate(source, judge, where) if ranks.number() == 0 else None
            store = Streamed(source, work, gate, spill=activations == "disk")
            size = min(_BATCH_TOKENS // seq_len, len(mine) // HELD_OUT)
            batches = mine.split(max(1, size))
            reports = run(source.model, batches, recipe, where, store)
            total = sum(map(bool, map(recipe.scheme_for, names)))
            show = progress and ranks.number() == 0
            layers = list(_watched(reports, total, show, store.done))
            if ranks.number() > 0:
                return ranks.of_the_first(None)
            digests, verdict = store.finish()
        report = {
            **origin(name, config),
            "command": command(quantize, given),
            "method": method,
            "bits": bits if bits % 1 else int(bits),
            "predicted_kl": kl,
            "group_size": group_size,
            "symmetric": symmetric,
            "lm_head": lm_head,
            "skip": list(skip),
            "calibration": {
                "text": "embedded" if calibration is None else _public(calibration),
                "sha256": fingerprint(windows),
                "windows": len(windows),
                "seq_len": seq_len,
                "tokens": windows.numel(),
                "bos": bos,
                "join": join,
                "seed": seed,
            },
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak_memory_bytes(where),
            "judged": {**verdict, "held_out": held_out},
            **_outcome(work.result, layers),
        }
        with writing(out):
            write_report(work.result, report)
            seal(work.result, digests)
            check(work.result)
            work.log("end", seconds=report["seconds"], **verdict)
            work.publish()
    return ranks.of_the_first(report)


def plan(
    src: str | os.PathLike[str],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    lm_head: bool = False,
    skip: Sequence[str] = (),
    tensor_parallel: Sequence[int] = (1,),
    out: str | os.PathLike[str] = ".",
) -> Plan:
    """What `quantize` would write and who would load it, before a weight is read.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        bits, group_size, symmetric, lm_head, skip: as for `quantize`.
        tensor_parallel: numbers of GPUs that shall share the result.
        out: where it shall be written; its disk is asked for room.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    recipe = Recipe(QuantScheme(bits, group_size, symmetric), skip=tuple(skip), lm_head=lm_head)
    name = check_path(src)
    config = full_precision(open_config(name), name)
    return planning.make(name, config, source_headers(name), recipe, ranks=tensor_parallel, out=out)


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
    """What rounding each layer to 2, 3, 4 or 8 bits is predicted to cost the whole model.

    One backward pass over 32 windows at most, with the whole model on `device`.

    Args:
        src: folder or Hub name of a full-precision causal language model.
        group_size, symmetric, calibration, samples, seq_len, skip, device, seed, join, bos: as for
            `quantize`.

    Returns:
        one entry for the layers that read one tensor (they share a width), in execution order.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    recipe = Recipe(QuantScheme(4, group_size, symmetric), skip=tuple(skip))
    name = check_path(src)
    config = full_precision(open_config(name), name)
    tokenizer = open_tokenizer(name)
    windows, _, _ = calibration_windows(
        calibration,
        tokenizer,
        config,
        samples=samples,
        seq_len=_window_length(config, seq_len, 512),
        seed=seed,
        join=join,
        bos=adds_bos(tokenizer) if bos is None else bos,
    )
    return scan(name, windows, recipe, pick_device(device), seed)


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    text: Source | None = None,
    *,
    tokenizer: Any = None,
    seq_len: int | None = None,
    windows: int | None = None,
    reference: str | os.PathLike[str] | nn.Module | None = None,
    join: str = "documents",
    bos: bool | None = None,
    protocol: str = "windows",
    record: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a model on a text and, with a reference, how far it moved from that.

    Args:
        model: folder, Hub name or model object, quantized or not.
        text: see `llmq.text`; None = a little public-domain text that comes with llmq.
        tokenizer: for a model object and text; token ids need none.
        seq_len: window length (default: the protocol's, or the model's context if that is
            shorter).
        windows: how many, from the start of the text; None = all.
        reference: the full-precision model: folder, Hub name or object.
        join: "wikitext" if `text` is a raw file of wikitext and rows shall be joined as in the
            GPTQ paper.
        bos: start every window with BOS. The paper does not; Gemma needs it.
        protocol: "windows", "wikitext2", "c4" or "llama.cpp", see `llmq.protocols`. The last three
            lay down join and bos.
        record: add the result to the report in the folder `model`, for its page and its card.
        adapter: folder of a LoRA adapter to put on the model first.
        device: "auto" = the GPU if there is one. A model object stays where it is.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    start = time.perf_counter()
    where = pick_device(device)
    name = None if isinstance(model, nn.Module) else check_path(model)
    config = model.config if name is None else open_config(name)  # type: ignore[union-attr]
    if name is not None and tokenizer is None:
        tokenizer = open_tokenizer(name)
    if record and adapter is not None:
        raise SourceError("record: the report is about the checkpoint without an adapter.")
    if record and (name is None or not (Path(name) / REPORT_FILE).is_file()):
        raise SourceError(f"{name}: record needs a folder that llmq quantize wrote.")
    seq_len = _window_length(config, seq_len, PROTOCOLS.get(protocol, 2048))
    if text is None and protocol == "wikitext2":
        text = WIKITEXT2
    read = read_windows(
        protocol,
        demo.evaluation_path() if text is None else text,
        tokenizer,
        seq_len=seq_len,
        samples=windows,
        join=join,
        bos=bos,
        described="llmq's own text" if text is None else _public(text),
    )
    check_vocabulary(read.ids, config)
    if isinstance(reference, str | os.PathLike):
        reference = open_model(check_path(reference), where)
    loaded = open_model(name, where) if name is not None else model
    assert isinstance(loaded, nn.Module)
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    found = measure(loaded, read.ids, reference, first=read.first, progress=progress)
    found = dataclasses.replace(
        found,
        seconds=time.perf_counter() - start,
        protocol=read.sentence,
        bits_per_weight=_stored_bits(name),
        peak_memory_bytes=peak_memory_bytes(where),
    )
    if record and name is not None:
        add_evaluation(Path(name), found.to_json())
    return found


def evaluate_tasks(
    model: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Scores of tasks of lm-evaluation-harness, see `llmq.harness.run_tasks`.

    Args:
        model: folder or Hub name, quantized or not.
        tasks, limit: see there.
        device: "auto" = the GPU if there is one.
    """
    name = check_path(model)
    check_installed()
    loaded = open_model(name, pick_device(device))
    return run_tasks(loaded, open_tokenizer(name), tasks, limit=limit)


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
    config, tokenizer = open_config(name), open_tokenizer(name)
    windows, _, _ = calibration_windows(
        calibration,
        tokenizer,
        config,
        samples=samples,
        seq_len=_window_length(config, seq_len, 512),
        seed=0,
        bos=adds_bos(tokenizer),
    )
    full, packed = open_model(check_path(original), where), open_model(name, where)
    return correction.correct(
        full, packed, windows, Path(out), rank=rank, base_model=public_name(name)
    )


def _with_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """`model` with an adapter in place beside its packed layers."""
    from llmq.peft import load_adapter  # needs the package peft

    return load_adapter(model, os.fspath(folder)).get_base_model()


def load(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A model of transformers, ready to use; weights that are packed on disk stay packed.

    Args:
        path: folder or Hub name, quantized by llmq or any tool that writes compressed-tensors.
        **kwargs: passed on to `hf.load` (`backend`, `fuse`, `head_bits`) and `from_pretrained`.
    """
    return hf.load(check_path(path), **kwargs)


def _public(source: Source) -> str:
    """A source of text in a few words, without the path of a file."""
    return public_name(source) if isinstance(source, str | os.PathLike) else describe(source)


def _outcome(folder: Path, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What a report says about versions and layers."""
    stored = inspect_checkpoint(folder)
    return {
        "llmq": llmq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bits_per_weight": bits_per_weight(stored),
        "bytes": sum(layer.bytes for layer in stored),
        "expert_coverage": expert_coverage(layers),
        "layers": [layer_entry(layer) for layer in layers],
    }


def _watched(
    reports: Iterable[LayerReport], total: int, show: bool, done: Iterable[LayerReport]
) -> Iterator[LayerReport]:
    """Pass reports on under a progress bar; all experts of a stack count as one matrix."""
    seen: set[str] = set()
    before = len({stack_name(report.name) for report in done})
    with progress_bar("Quantizing", total, show=show, before=before) as advance:
        for report in reports:
            seen.add(stack_name(report.name))
            advance(len(seen))
            yield report


def _window_length(config: Any, seq_len: int | None, default: int) -> int:
    limit = context_length(config)
    if seq_len is None:
        return min(default, limit or default)
    if limit is not None and seq_len > limit:
        raise CalibrationError(f"seq_len={seq_len}: this model has a context of {limit} tokens.")
    return seq_len


def _stored_bits(name: str | None) -> float | None:
    """Bits per weight of a checkpoint in a local folder; else not known."""
    if name is None or not any(Path(name).glob("*.safetensors")):
        return None
    try:
        return bits_per_weight(inspect_checkpoint(Path(name)))
    except FormatError:  # quantized by another tool, in a format that we cannot count
        return None
