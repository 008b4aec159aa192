"""Greedy decoding with a static cache: one step that is compiled, captured in a CUDA graph, or not.

    Decoder    prefill a prompt, then take steps; every tensor of a step stays where it is
    decode     the tokens that `model.generate(do_sample=False)` finds, faster

The cache has one length for all layers: those with a sliding window keep everything and mask it,
so that a step depends on no number in Python and can be replayed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from llmq.errors import BackendError
from llmq.graph import Step, beside, captured, without_waiting

Mode = Literal["eager", "compiled", "graph", "compiled graph"]
MODES: tuple[Mode, ...] = ("eager", "compiled", "graph", "compiled graph")
CHECK_EVERY = 16  # steps between looks at whether all sequences have ended: each waits for the GPU
# What makes `generate` choose other tokens than the likeliest, and the value at which it does not.
_NEUTRAL = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "min_length": 0, "num_beams": 1, "guidance_scale": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
_UNSET = (
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty", "min_new_tokens",
)  # fmt: skip


class Decoder:
    """A model, a static cache and the step that turns each sequence's last token into its next.

    Args:
        model: of transformers, decoder-only, on one device.
        length: positions that the cache holds.
        mode: "eager"; "compiled" by torch.compile; "graph" captured in a CUDA graph; or both.
        backend: of torch.compile.

    Raises:
        BackendError: see `why_not`.
    """

    def __init__(
        self, model: PreTrainedModel, length: int, mode: Mode = "eager", backend: str = "inductor"
    ) -> None:
        if reason := why_not(model, mode):
            raise BackendError(f"mode={mode!r}: {reason}")
        self.model, self.mode = model, mode
        self.cache = static_cache(model, length)
        self.token = torch.empty(0, 1, dtype=torch.long)  # (B, 1), the newest of each sequence
        step = self._step
        if mode.startswith("compiled"):
            step = torch.compile(step, fullgraph=True, backend=backend)
        self._eager: Step = step
        self._replay: Step | None = None
        self._taken = 0

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        """Read prompts (B, T), from the start; `token` is then the first new one of each.

        B is fixed by the first call.
        """
        self.cache.reset()
        token = self._logits(ids).argmax(-1, keepdim=True)
        if len(self.token):
            self.token.copy_(token)
        else:
            self.token = token

    @torch.no_grad()
    def step(self) -> None:
        """Feed `token` to the model and put the next one in its place.

        Raises:
            BackendError: in the first two steps: this model's cannot be compiled or captured.
        """
        if self._replay is not None:
            self._replay()
        elif self._taken < 2:
            self._try()
        elif not self.mode.endswith("graph"):
            self._eager()
        else:
            self._replay = captured(self._eager, self.model.device)
            self._replay()
        self._taken += 1

    def _try(self) -> None:
        """One of the first two steps: what is captured must have run before.

        The first compiles, which may wait for the GPU.
        """
        try:
            if not self.mode.endswith("graph"):
                self._eager()
            elif self._taken == 0:
                beside(self._eager, self.model.device)
            else:
                with without_waiting():
                    beside(self._eager, self.model.device)
        except RuntimeError as error:
            if reason := _refused(error):
                raise BackendError(f"mode={self.mode!r}: {reason}") from error
            raise

    def _step(self) -> None:
        self.token.copy_(self._logits(self.token).argmax(-1, keepdim=True))

    def _logits(self, ids: Tensor) -> Tensor:
        """Of the last position: (B, vocabulary)."""
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    mode: Mode = "eager",
    backend: str = "inductor",
) -> Tensor:
    """The likeliest continuation, token by token: what `model.generate(do_sample=False)` returns.

    Args:
        model: of transformers, decoder-only.
        ids: prompts (B, T), without padding.
        max_new_tokens: per sequence; all stop when each has met an end token of the generation
            config, and those that met theirs earlier are padded.
        mode, backend: see `Decoder`.

    Returns:
        prompts and new tokens (B, T + new).

    Raises:
        BackendError: this model, generation config or device cannot be decoded so.
    """
    if reason := _not_greedy(model.generation_config):
        raise BackendError(f"mode={mode!r}: {reason}")
    decoder = Decoder(model, ids.shape[1] + max_new_tokens, mode, backend)
    ids = ids.to(model.device)
    decoder.prefill(ids)
    found = [decoder.token.clone()]
    ends = _end_tokens(model.generation_config, ids.device)
    while len(found) < max_new_tokens:
        if len(found) % CHECK_EVERY == 0 and torch.isin(torch.cat(found, 1), ends).any(1).all():
            break
        decoder.step()
        found.append(decoder.token.clone())
    return torch.cat((ids, _padded(torch.cat(found, 1), ends, model.generation_config)), 1)


def static_cache(model: PreTrainedModel, length: int) -> Cache:
    """A cache of `length` positions in every layer, sliding windows included."""
    layers = StaticCache(model.config, max_cache_len=length).layers
    return Cache(layers=[StaticLayer(length) for _ in layers])


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values of a static cache that has been used."""
    layers = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.nbytes for t in tensors)


def why_not(model: PreTrainedModel, mode: Mode) -> str | None:
    """None if a `Decoder` can run `model` so, else the sentence the user reads."""
    if mode not in MODES:
        return f"use one of {', '.join(MODES)}."
    if mode.endswith("graph") and model.device.type != "cuda":
        return f"the model is on {model.device.type}; CUDA graphs need a CUDA GPU."
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return "parts of the model are on different devices."
    kinds = {type(layer) for layer in StaticCache(model.config, max_cache_len=1).layers}
    if other := kinds - {StaticLayer, StaticSlidingWindowLayer}:
        return f"this model keeps state in {other.pop().__name__}, not in keys and values alone."
    return None


def _refused(error: RuntimeError) -> str | None:
    """What is wrong with a model whose step raised this; None: the error is about other things."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and seldom wanted

    if "synchronizing CUDA operation" in str(error):
        found = "waits for the GPU, which a CUDA graph cannot do"
    elif isinstance(error, TorchDynamoException):
        found = "cannot be compiled by torch"
    else:
        return None
    return f"a step of this model {found}; use mode='eager', that is, no --fast."


def _not_greedy(config: Any) -> str | None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            return f"generation_config.json sets {name}={value}, and this only takes the likeliest."
    for name in _UNSET:
        if getattr(config, name, None):
            return f"generation_config.json sets {name}, and this only takes the likeliest token."
    return None


def _end_tokens(config: Any, device: torch.device) -> Tensor:
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return torch.tensor(ends, dtype=torch.long, device=device)


def _padded(tokens: Tensor, ends: Tensor, config: Any) -> Tensor:
    """New tokens (B, T) as `generate` returns them: padded behind an end token, cut after all."""
    is_end = torch.isin(tokens, ends).long()
    behind = is_end.cumsum(1) - is_end > 0  # an end token before this position
    pad = config.pad_token_id if config.pad_token_id is not None else (ends.tolist() or [0])[0]
    tokens = tokens.masked_fill(behind, pad)
    return tokens[:, : int((~behind).any(0).sum())]
