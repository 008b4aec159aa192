"""Text from a prompt, without touching torch's global random state."""

from __future__ import annotations

from typing import Any

import torch

from llmq.decode import Mode, decode
from llmq.errors import BackendError, SourceError


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    fast: bool = False,
) -> str:
    """The prompt and what the model makes of it.

    Args:
        model, tokenizer: of transformers.
        prompt: plain text.
        max_new_tokens: at most this many tokens are added.
        temperature: 0 = always the likeliest token.
        seed: for temperatures above 0.
        chat: put the prompt through the tokenizer's chat template; only the answer is returned.
        fast: take the step of `llmq.decode`: captured in a CUDA graph on a GPU; compiled on a CPU,
            which takes a minute before the first token. The tokens are the same.

    Raises:
        SourceError: a chat is wanted and the tokenizer has no chat template; an empty prompt.
        BackendError: `fast` with a temperature, or with a model that cannot be decoded so.
    """
    if fast and temperature > 0:
        raise BackendError("--fast takes the likeliest token; leave --temperature at 0.")
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise SourceError("This tokenizer has no chat template; leave --chat off.")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise SourceError("The prompt is empty; give --prompt some text.")
    device = next(model.parameters()).device
    start = ids.shape[1] if chat else 0
    if fast:
        mode: Mode = "graph" if device.type == "cuda" else "compiled"
        out = decode(model, ids.to(device), max_new_tokens, mode=mode)
        return tokenizer.decode(out[0, start:], skip_special_tokens=True)
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=_padding(model, tokenizer),
            **settings,
        )
    return tokenizer.decode(out[0, start:], skip_special_tokens=True)


def _padding(model: Any, tokenizer: Any) -> int:
    """Any token will do for one sequence; naming one keeps transformers quiet."""
    end = model.generation_config.eos_token_id
    first = end[0] if isinstance(end, list) else end
    known = (tokenizer.pad_token_id, first, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
