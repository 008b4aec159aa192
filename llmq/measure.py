"""What a model lost: `evaluate` on a text, `evaluate_tasks` of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llmq import demo
from llmq.adapters import widened
from llmq.errors import FormatError, SourceError
from llmq.evaluate import Evaluation, evaluate as measured
from llmq.harness import check_installed, run_tasks
from llmq.inputs import check_vocabulary, public_source, window_length
from llmq.protocols import PROTOCOLS, WIKITEXT2, read_windows
from llmq.report import REPORT_FILE, add_evaluation, peak_memory_bytes
from llmq.source import check_path, open_config, open_model, open_tokenizer, pick_device
from llmq.stored import bits_per_weight, inspect_checkpoint
from llmq.text import Source


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
    if record:
        _check_record(name, adapter)
    seq_len = window_length(config, seq_len, PROTOCOLS.get(protocol, 2048))
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
        described="llmq's own text" if text is None else public_source(text),
    )
    check_vocabulary(read.ids, config)
    full = None if reference is None else _opened(reference, where)
    loaded = _opened(model, where)
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    found = measured(loaded, read.ids, full, first=read.first, progress=progress)
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
    reference: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Scores of tasks of lm-evaluation-harness, see `llmq.harness.run_tasks`.

    Args:
        model: folder or Hub name, quantized or not.
        tasks, limit: see there.
        reference: the full-precision model, for differences example by example, or None.
        device: "auto" = the GPU if there is one.
    """
    name, where = check_path(model), pick_device(device)
    check_installed()
    full = None if reference is None else _opened(reference, where)
    loaded = _opened(name, where)
    return run_tasks(loaded, open_tokenizer(name), tasks, reference=full, limit=limit)


def _check_record(name: str | None, adapter: str | os.PathLike[str] | None) -> None:
    if adapter is not None:
        raise SourceError("record: the report is about the checkpoint without an adapter.")
    if name is None or not (Path(name) / REPORT_FILE).is_file():
        raise SourceError(f"{name}: record needs a folder that llmq quantize wrote.")


def _opened(model: str | os.PathLike[str] | nn.Module, device: str) -> nn.Module:
    """A model object as it is, any other from its folder or the Hub."""
    if isinstance(model, nn.Module):
        return model
    return widened(open_model(check_path(model), device))


def _with_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """`model` with an adapter in place beside its packed layers."""
    from llmq.peft import load_adapter  # needs the package peft

    return load_adapter(model, os.fspath(folder)).get_base_model()


def _stored_bits(name: str | None) -> float | None:
    """Bits per weight of a checkpoint in a local folder; else not known."""
    if name is None or not any(Path(name).glob("*.safetensors")):
        return None
    try:
        return bits_per_weight(inspect_checkpoint(Path(name)))
    except FormatError:  # quantized by another tool, in a format that we cannot count
        return None
