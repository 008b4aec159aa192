"""Text in, windows of token ids out.

Documents are joined by a blank line and the whole is tokenised once, without special tokens;
windows are consecutive pieces of that stream which never overlap. That is how the GPTQ paper
(Frantar et al. 2022, arXiv:2210.17323) cuts its test sets. Only `bos=True` adds a token: every
window then starts with the tokenizer's BOS, followed by seq_len - 1 tokens of the stream.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import CalibrationError
from llmq.text import Source, describe, load_text, several


def token_windows(
    source: Source,
    tokenizer: Any,
    *,
    seq_len: int,
    samples: int | None = None,
    seed: int | None = None,
    join: str = "documents",
    bos: bool = False,
    short_ok: bool = False,
    spare: int = 0,
) -> Tensor:
    """Cut a source of text into windows of token ids.

    Args:
        source: see `llmq.text`. Of several, each gives the same number of windows (the first ones
            one more where that does not come out even), and they take turns.
        tokenizer: of transformers; may be None if `source` holds token ids.
        seq_len: tokens per window.
        samples: how many windows; None = all there are.
        seed: which ones: None = the first, an integer = chosen at random by this seed, in the
            order of the text. Torch's global random state is neither read nor changed.
        join: "documents", or "wikitext" for the raw file of wikitext (see `wikitext_rows`).
        bos: start every window with the tokenizer's BOS (ignored for token ids).
        short_ok: give fewer windows than `samples`, at least one, if the text ends before.
        spare: windows to add at the end that are not among the `samples`, as far as there are any.

    Returns:
        int64 (samples + spare, seq_len).

    Raises:
        CalibrationError: the source is missing, unreadable, empty or too short.
    """
    if seq_len < 2:
        raise CalibrationError(f"seq_len={seq_len}: a window needs at least 2 tokens.")
    if samples is not None and samples < 1:
        raise CalibrationError(f"samples={samples}: at least 1 window is needed.")
    if paths := several(source):
        cut = functools.partial(
            token_windows, tokenizer=tokenizer, seq_len=seq_len, seed=seed, join=join, bos=bos
        )
        return _in_turn(paths, cut, samples, spare)
    wanted = samples or 1
    stream, is_text = token_stream(
        source, tokenizer, join=join, max_tokens=seq_len * (wanted + spare)
    )
    bos = bos and is_text
    width = seq_len - 1 if bos else seq_len
    available = len(stream) // width
    if available < (1 if short_ok else wanted):
        raise CalibrationError(
            f"{describe(source)}: found {len(stream)} tokens, need {width * wanted} "
            f"({wanted} windows of {width}). Give more text, fewer windows or shorter ones."
        )
    windows = stream[: available * width].view(available, width)
    if samples is not None and seed is None:
        windows = windows[: samples + spare]
    elif samples is not None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(available, generator=generator)
        chosen = torch.cat([order[:samples].sort().values, order[samples : samples + spare]])
        windows = windows[chosen]
    if bos:
        first = torch.full((len(windows), 1), _bos_id(tokenizer))
        windows = torch.cat([first, windows], 1)
    return windows


def _in_turn(
    paths: Sequence[os.PathLike[str]], cut: Callable[..., Tensor], samples: int | None, spare: int
) -> Tensor:
    """Windows of several sources, one of each in turn; the spare ones are the first source's."""
    if samples is None or samples < len(paths):
        raise CalibrationError(
            f"samples={samples}: {len(paths)} texts need {len(paths)} windows at least."
        )
    shares = [len(range(first, samples, len(paths))) for first in range(len(paths))]
    extra = [spare] + [0] * (len(paths) - 1)
    parts = [
        cut(path, samples=share, spare=more)
        for path, share, more in zip(paths, shares, extra, strict=True)
    ]
    windows = [
        part[turn]
        for turn in range(shares[0])
        for part, share in zip(parts, shares, strict=True)
        if turn < share
    ]
    return torch.stack([*windows, *parts[0][shares[0] :]])


def check_variety(windows: Tensor) -> None:
    """Refuse calibration windows (B, T) most of which repeat others.

    Raises:
        CalibrationError: says how many are different.
    """
    different = len(windows.unique(dim=0))
    if different < len(windows) / 2:
        raise CalibrationError(
            f"Only {different} of {len(windows)} calibration windows are different: the text "
            "repeats itself. Give other text, or fewer samples."
        )


def token_stream(
    source: Source, tokenizer: Any, *, join: str = "documents", max_tokens: int | None = None
) -> tuple[Tensor, bool]:
    """All token ids of a source, int64 (tokens,), and whether they come from text.

    `max_tokens` only bounds what is read of a data set on the Hub.
    """
    ids = _given_ids(source)
    if ids is not None:
        return ids, False
    text = load_text(source, tokenizer, join=join, max_tokens=max_tokens)
    if tokenizer is None:
        raise CalibrationError(f"{describe(source)}: a tokenizer is needed to read text.")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64), True


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer starts every text with BOS, so that the model expects one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def _bos_id(tokenizer: Any) -> int:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise CalibrationError("This tokenizer has no BOS token; leave bos off.")
    return bos


def _given_ids(source: Source) -> Tensor | None:
    """int64 (tokens,) if the source is token ids; None if it is text."""
    if isinstance(source, Tensor):
        if source.is_floating_point() or source.is_complex() or source.dtype == torch.bool:
            raise CalibrationError(f"Token ids must be integers, not {source.dtype}.")
        return source.flatten().to("cpu", torch.int64)
    if isinstance(source, str | os.PathLike) or not source or isinstance(source[0], str):
        return None
    if not all(isinstance(row, Sequence) and not isinstance(row, str) for row in source):
        raise CalibrationError("Token ids must be a list of lists of integers, or a tensor.")
    flat = [token for row in source if isinstance(row, Sequence) for token in row]
    if not all(isinstance(token, int) for token in flat):
        raise CalibrationError("Token ids must be integers.")
    return torch.tensor(flat, dtype=torch.int64)
