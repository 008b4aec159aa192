"""What a run starts from: its text, and everything that determines its bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import llmq
from llmq import demo, ranks, shards
from llmq.calibrate import adds_bos, check_variety, token_windows
from llmq.codebook import CodebookScheme
from llmq.errors import CalibrationError, SchemeError
from llmq.gate import TOKENS
from llmq.hf.streaming import StoredModel
from llmq.objective import HELD_OUT
from llmq.origin import public_name
from llmq.recipe import Recipe
from llmq.scheme import QuantScheme
from llmq.source import context_length
from llmq.superblocks import SuperBlockScheme
from llmq.text import Source, describe, several
from llmq.verify import fingerprint

SEQ_LEN = 512  # tokens of a calibration window, if nobody says
_RTN_SAMPLES = 8  # rounding needs no text; these only measure the error that it made

# What the identity of a run has under names of its own.
_TOLD: dict[str, Any] = {
    "scheme": QuantScheme(),
    "schemes": {},
    "skip": (),
    "lm_head": False,
    "embeddings": None,
}


@dataclass(frozen=True)
class Calibration:
    """Token ids to calibrate on.

    Attributes:
        windows: int64 (samples, seq_len).
        judge: int64 (1, T), what the result is judged by.
        held_out: whether `judge` is none of `windows`.
        told: what a report says of them.
    """

    windows: Tensor
    judge: Tensor
    held_out: bool
    told: dict[str, Any]


def read_calibration(
    text: Source | None,
    tokenizer: Any,
    config: Any,
    *,
    samples: int,
    seq_len: int | None = None,
    seed: int = 0,
    join: str = "documents",
    bos: bool | None = None,
) -> Calibration:
    """Cut calibration text into windows; see `api.quantize` for the arguments.

    Raises:
        CalibrationError: the text is missing, too short, repeats itself, or is not the model's.
    """
    seq_len = window_length(config, seq_len, SEQ_LEN)
    bos = adds_bos(tokenizer) if bos is None else bos
    windows = token_windows(
        demo.calibration_path() if text is None else text,
        tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        join=join,
        bos=bos,
        short_ok=text is None,
        spare=1,
    )
    check_vocabulary(windows, config)
    windows, spare = windows[:samples], windows[samples:]
    check_variety(windows)
    told = {
        "text": "embedded" if text is None else public_source(text),
        "sha256": fingerprint(windows),
        "windows": len(windows),
        "seq_len": seq_len,
        "tokens": windows.numel(),
        "bos": bos,
        "join": join,
        "seed": seed,
    }
    judge = (spare if len(spare) else windows)[-1:, :TOKENS]
    return Calibration(windows, judge, bool(len(spare)), told)


def windows_for(method: str, samples: int) -> int:
    """How many of `samples` windows a method makes use of."""
    return min(samples, _RTN_SAMPLES) if method == "rtn" else samples


def window_length(config: Any, seq_len: int | None, default: int) -> int:
    """Tokens per window: as asked for, or `default` as far as the model's context reaches.

    Raises:
        CalibrationError: the model's context is shorter than `seq_len`.
    """
    limit = context_length(config)
    if seq_len is None:
        return min(default, limit or default)
    if limit is not None and seq_len > limit:
        raise CalibrationError(f"seq_len={seq_len}: this model has a context of {limit} tokens.")
    return seq_len


def public_source(source: Source) -> str:
    """A source of text in a few words, without paths of files."""
    if paths := several(source):
        return ", ".join(map(public_name, paths))
    return public_name(source) if isinstance(source, str | os.PathLike) else describe(source)


def share(windows: Tensor, recipe: Recipe) -> Tensor:
    """This process's part of the calibration windows.

    Raises:
        CalibrationError: too few windows for so many processes.
        SchemeError: the recipe needs all of them in one process.
    """
    processes = ranks.count()
    if processes > 1 and isinstance(recipe.scheme, CodebookScheme | SuperBlockScheme):
        raise SchemeError("Code books and K-quants are made in one process: use one, or integers.")
    if processes > 1 and recipe.awq:
        raise SchemeError("AWQ looks at all hidden states: use one process, or another method.")
    if processes > 1 and (recipe.scales or recipe.block):
        raise SchemeError("Tuning runs in one process: use one, or --tune-scales 0.")
    if processes > 1 and len(windows) < processes * HELD_OUT:
        raise CalibrationError(
            f"samples={len(windows)}: {processes} processes need {processes * HELD_OUT} at least."
        )
    return windows[ranks.number() :: processes]


def identity(
    source: StoredModel,
    recipe: Recipe,
    method: str,
    text: Calibration,
    device: str,
) -> dict[str, Any]:
    """Everything that determines the bytes of a checkpoint."""
    scheme = dataclasses.asdict(recipe.scheme)
    return {
        "source weights": shards.check_source(source.files),
        "source config": shards.file_hash(source.folder / "config.json"),
        "method": method,
        **scheme,
        "skip": list(recipe.skip),
        "lm_head": recipe.lm_head,
        "embeddings": recipe.embeddings,
        "solver": repr(dataclasses.replace(recipe, **_TOLD)),
        "widths": hashlib.sha256(repr(sorted(recipe.schemes.items())).encode()).hexdigest(),
        "calibration tokens": text.told["sha256"],
        "judged tokens": fingerprint(text.judge),
        "calibration shape": list(text.windows.shape),
        "device": device,
        "processes": ranks.count(),
        "llmq": llmq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_vocabulary(windows: Tensor, config: Any) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        CalibrationError: with their range.
    """
    size = config.get_text_config().vocab_size
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= size:
        raise CalibrationError(
            f"Token ids reach from {low} to {high}, but the model knows 0 to {size - 1}. "
            "Use this model's own tokenizer."
        )
