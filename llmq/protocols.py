"""Protocols of perplexity: which windows of a text are read, and which of their tokens count.

    windows      non-overlapping windows of the text, tokenised without special tokens; BOS in
                 front of each if asked for. The default.
    wikitext2    as in the GPTQ paper (Frantar et al. 2022, arXiv:2210.17323) and most after it:
                 rows of the test set joined by blank lines, BOS once if the tokenizer adds it,
                 windows of 2048, the rest dropped
    c4           as in the code of the same paper: 256 crops of 2048 tokens, from documents drawn
                 with Python's generator at seed 0, each tokenised with its special tokens
    llama.cpp    as its `perplexity` tool: windows of 512 whose first token is overwritten by BOS
                 if the tokenizer adds one, only the second half of each scored

Numbers of two protocols, two window lengths or two tokenizers cannot be compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibrate import adds_bos, token_windows
from llmq.errors import CalibrationError
from llmq.text import Source, describe, documents, load_text

PROTOCOLS = {"windows": 2048, "wikitext2": 2048, "c4": 2048, "llama.cpp": 512}  # window lengths
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"
_C4_CROPS = 256


@dataclass(frozen=True)
class Windows:
    """What is read and scored.

    Attributes:
        ids: int64 (windows, seq_len).
        first: tokens up to this position are only context, see `evaluate.evaluate`.
        sentence: how a number was measured; belongs beside it wherever it is shown.
    """

    ids: Tensor
    first: int
    sentence: str


def read_windows(
    protocol: str,
    source: Source,
    tokenizer: Any,
    *,
    seq_len: int,
    samples: int | None = None,
    join: str = "documents",
    bos: bool | None = None,
    described: str | None = None,
) -> Windows:
    """The windows of a protocol.

    Args:
        protocol: a key of PROTOCOLS.
        source: see `llmq.text`.
        tokenizer: of transformers.
        seq_len: tokens per window.
        samples: how many windows, from the start; None = all, or 256 for c4.
        join, bos: for "windows" only, see `calibrate.token_windows`; the others lay them down.
        described: the text in a few words (default: what the source is called).

    Raises:
        CalibrationError: an unknown protocol, or text that is missing, empty or too short.
    """
    text = described or describe(source)
    if protocol == "windows":
        ids = token_windows(
            source, tokenizer, seq_len=seq_len, samples=samples, join=join, bos=bool(bos)
        )
        rows = " as rows joined by blank lines (GPTQ paper)" if join == "wikitext" else ""
        policy = "each starting with BOS" if bos else "no BOS"
        return _described(f"{text}{rows}", "non-overlapping windows", ids, 0, policy)
    if protocol not in PROTOCOLS:
        raise CalibrationError(f"protocol={protocol!r}: use one of {', '.join(PROTOCOLS)}.")
    if bos is not None or join != "documents":
        raise CalibrationError(f"protocol={protocol!r} lays down join and bos; leave them out.")
    if tokenizer is None or not isinstance(source, str | Path | Sequence):
        raise CalibrationError(f"protocol={protocol!r}: text and a tokenizer are needed.")
    once = adds_bos(tokenizer)
    if protocol == "wikitext2":
        raw = isinstance(source, str | Path) and Path(source).is_file()
        joined = load_text(source, tokenizer, join="wikitext" if raw else "documents")
        ids = _cut(_encode(tokenizer, joined), seq_len, samples, text)
        policy = "BOS once, at the start of the text" if once else "no BOS"
        name = f"{text} as rows joined by blank lines (GPTQ paper)"
        return _described(name, "non-overlapping windows", ids, 0, policy)
    if protocol == "c4":
        ids = _c4_crops(documents(source, tokenizer), tokenizer, seq_len, samples or _C4_CROPS)
        policy = "BOS where a crop starts its document" if once else "no BOS"
        return _described(f"{text} as in the GPTQ code", "random crops", ids, 0, policy)
    ids = _cut(_encode(tokenizer, load_text(source, tokenizer)), seq_len, samples, text)
    if once:
        ids[:, 0] = tokenizer.bos_token_id
    policy = "BOS in place of each first token" if once else "no BOS"
    first = seq_len // 2
    return _described(f"{text} as in llama.cpp", "non-overlapping windows", ids, first, policy)


def _described(text: str, kind: str, ids: Tensor, first: int, policy: str) -> Windows:
    windows, seq_len = ids.shape
    scored = windows * (seq_len - 1 - first)
    half = " of their second halves" if first else ""
    sentence = (
        f"{text}: {windows} {kind} of {seq_len} tokens, {policy}, {scored} tokens{half} scored; "
        "+- is one standard error over windows."
    )
    return Windows(ids, first, sentence)


def _encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids (tokens,) with the special tokens that this tokenizer adds on its own."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _cut(stream: Tensor, seq_len: int, samples: int | None, text: str) -> Tensor:
    """Whole windows (windows, seq_len) from the start of a stream."""
    available = len(stream) // seq_len
    if available < (samples or 1):
        raise CalibrationError(
            f"{text}: found {len(stream)} tokens, need {seq_len * (samples or 1)}. "
            "Give more text, fewer windows or shorter ones."
        )
    return stream[: (samples or available) * seq_len].view(-1, seq_len).clone()


def _c4_crops(texts: Sequence[str], tokenizer: Any, seq_len: int, count: int) -> Tensor:
    """Crops (count, seq_len): documents that are not longer than a window are drawn again."""
    draw = random.Random(0)  # what `random.seed(0)` gives, without touching the global generator
    short: set[int] = set()
    crops: list[Tensor] = []
    while len(crops) < count:
        chosen = draw.randint(0, len(texts) - 1)
        ids = None if chosen in short else _encode(tokenizer, texts[chosen])
        if ids is not None and len(ids) > seq_len:
            start = draw.randint(0, len(ids) - seq_len - 1)
            crops.append(ids[start : start + seq_len])
            continue
        short.add(chosen)
        if len(short) == len(texts):
            raise CalibrationError(
                f"c4: none of {len(texts)} documents is longer than {seq_len} tokens. Give a "
                ".jsonl with one document per line (the paper: c4-validation.00000-of-00008), "
                "or a smaller seq_len."
            )
    return torch.stack(crops)
