"""What a run starts from: its text, and everything that determines its bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
import transformers
from torch import Tensor

import llmq
from llmq import demo, ranks, shards
from llmq.calibrate import check_variety, token_windows
from llmq.errors import CalibrationError, SchemeError
from llmq.gate import TOKENS
from llmq.hf.streaming import StoredModel
from llmq.objective import HELD_OUT
from llmq.quantize import Recipe
from llmq.scheme import QuantScheme
from llmq.text import Source
from llmq.verify import fingerprint

# What the identity of a run has under names of its own.
_TOLD: dict[str, Any] = {"scheme": QuantScheme(), "schemes": {}, "skip": (), "lm_head": False}


def calibration_windows(
    text: Source | None, tokenizer: Any, config: Any, *, samples: int, bos: bool, **how: Any
) -> tuple[Tensor, Tensor, bool]:
    """Calibration windows (B, T), one (1, T) to judge by, and whether that is none of them."""
    windows = token_windows(
        demo.calibration_path() if text is None else text,
        tokenizer,
        samples=samples,
        bos=bos,
        short_ok=text is None,
        spare=1,
        **how,
    )
    check_vocabulary(windows, config)
    windows, spare = windows[:samples], windows[samples:]
    check_variety(windows)
    judge = (spare if len(spare) else windows)[-1:, :TOKENS]
    return windows, judge, bool(len(spare))


def share(windows: Tensor, recipe: Recipe) -> Tensor:
    """This process's part of the calibration windows.

    Raises:
        CalibrationError: too few windows for so many processes.
        SchemeError: the recipe needs all of them in one process.
    """
    processes = ranks.count()
    if processes > 1 and recipe.awq:
        raise SchemeError("AWQ looks at all hidden states: use one process, or another method.")
    if processes > 1 and len(windows) < processes * HELD_OUT:
        raise CalibrationError(
            f"samples={len(windows)}: {processes} processes need {processes * HELD_OUT} at least."
        )
    return windows[ranks.number() :: processes]


def identity(
    source: StoredModel,
    recipe: Recipe,
    method: str,
    windows: Tensor,
    judge: Tensor,
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
        "solver": repr(dataclasses.replace(recipe, **_TOLD)),
        "widths": hashlib.sha256(repr(sorted(recipe.schemes.items())).encode()).hexdigest(),
        "calibration tokens": fingerprint(windows),
        "judged tokens": fingerprint(judge),
        "calibration shape": list(windows.shape),
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
