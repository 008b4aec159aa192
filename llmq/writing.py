"""Calibration text that a model writes itself, where there is no text like that which it will see.

A model samples from its own distribution, starting from nothing but the token with which its
documents begin. That text needs no data set, and is of every kind the model was trained on, in
about the same shares (Williams & Aletras 2024, "Self-calibration for language model quantization
and pruning", arXiv:2410.17170).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmq.calibrate import token_stream
from llmq.errors import CalibrationError, NonFiniteError
from llmq.progress import progress_bar

ROWS = 32  # documents that are written at once


def documents_of(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
    show: bool = False,
) -> list[str]:
    """Documents that a model makes up.

    Args:
        model, tokenizer: of transformers, decoder-only.
        tokens: that the documents, joined by blank lines, shall have at least.
        length: tokens of one document at most; those that the model ends itself are shorter.
        temperature: that logits are divided by.
        seed: of the draws; torch's global random state is neither read nor changed.
        show: a progress bar on a terminal.

    Raises:
        CalibrationError: the temperature is not above 0; no token starts a document; or the model
            says next to nothing.
        NonFiniteError: the logits are NaN or infinite.
    """
    if not temperature > 0:
        raise CalibrationError(f"temperature={temperature}: use a number above 0, such as 1.")
    first, ends = _borders(model, tokenizer)
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[str] = []
    have = 0
    with progress_bar("writing tokens", tokens, show=show) as advance:
        while have < tokens:
            drawn: list[Tensor] = []
            for newest in _draw(model, first, ends, length, temperature, generator):
                drawn.append(newest)
                advance(min(have + ROWS * len(drawn), tokens))
            rows = torch.cat(drawn, 1).tolist()
            found += filter(str.strip, (_text(row, ends, tokenizer) for row in rows))
            before, have = have, len(token_stream(found, tokenizer)[0]) if found else 0
            if have < before + ROWS:
                raise CalibrationError(
                    f"This model ends its documents at once: {ROWS} of them have "
                    f"{have - before} tokens. Give text to calibrate on."
                )
            advance(min(have, tokens))
    return found


def _borders(model: Any, tokenizer: Any) -> tuple[int, list[int]]:
    """The token that documents start with, and those that end one."""
    stated = model.generation_config.eos_token_id
    ends = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    known = sorted({token for token in ends if token is not None})
    # Models without BOS were trained on documents with their end between them.
    starts = (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in (*starts, *known) if token is not None), None)
    if first is None:
        raise CalibrationError(
            "This model has no token that starts or ends a document. Give text to calibrate on."
        )
    return first, known


@torch.no_grad()
def _draw(
    model: Any,
    first: int,
    ends: list[int],
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The next token of every document, int64 (ROWS, 1); what follows an end is to be ignored."""
    device = model.device
    newest = torch.full((ROWS, 1), first, device=device)
    final = torch.tensor(ends, dtype=torch.long, device=device)
    over = torch.zeros(ROWS, 1, dtype=torch.bool, device=device)
    cache = None
    for _ in range(length):
        out = model(input_ids=newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        chances = (out.logits[:, -1].float() / temperature).softmax(-1)
        if not chances.isfinite().all():
            raise NonFiniteError(
                "The model's logits are NaN or infinite while it writes: it overflows in its "
                "number format. Convert it to bfloat16 or float32 first."
            )
        newest = torch.multinomial(chances, 1, generator=generator)
        over |= torch.isin(newest, final)
        yield newest
        if over.all():
            return


def _text(ids: list[int], ends: list[int], tokenizer: Any) -> str:
    """What stands before the first end."""
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True)
