"""Is the quantized model usable? A few held-out tokens, carried along from block to block.

Three streams of hidden states go through every block: the original's, that of a model rounded to
nearest in the same number format, and the quantized model's. At the end their logits are compared.
A solver that sees calibration text loses less than rounding does; one that loses several times as
much is wrong, or its calibration text is. Costs one window per block, three times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.adapters import as_linears, run_copy, run_dtype, running, shared_copy
from llmq.blocks import logits_behind, record_calls, run_block
from llmq.errors import IntegrityError
from llmq.hf.streaming import StoredModel
from llmq.scheme import QuantizedWeight
from llmq.solvers.rtn import RTN
from llmq.store import LayerReport

TOKENS = 256  # at most
ROWS = 32  # tokens whose probabilities are in memory at once: vocabularies are large
# Limits in nats per token. Broken models are several nats off; the slack is for tiny models and
# little text, where neither number means much.
FACTOR, SLACK = 3.0, 0.1


class Gate:
    """Judges a run by one window of tokens.

    Args:
        source: the full-precision model.
        tokens: int64 (1, T).
        device: where blocks run.
    """

    def __init__(self, source: StoredModel, tokens: Tensor, device: str) -> None:
        self._source = source
        self._tokens = tokens
        self._where = torch.device(device)
        with source.outer():
            self._recording = record_calls(source.model, source.blocks, [tokens], source.block(0))

    def start(self, states: MutableSequence[Tensor]) -> None:
        """Fill an empty list with the three streams that enter block 0."""
        [hidden] = self._recording.hidden
        states.extend([hidden] * 3)

    def step(
        self,
        index: int,
        block: nn.Module,
        solved: Mapping[str, Sequence[QuantizedWeight]],
        states: MutableSequence[Tensor],
    ) -> None:
        """Carry the streams through a block; behind the last one, two of them to logits.

        Args:
            block: dense, as it was solved (its norms may have been smoothed).
            solved: what is packed of it.
            states: original, rounded, quantized.
        """
        original = self._source.block(index)
        rounded = {name: [RTN()] * len(results) for name, results in solved.items()}
        states[0] = self._through(index, original, {}, states[0])
        states[1] = self._through(index, original, rounded, states[1], solved)
        states[2] = self._through(index, block, solved, states[2])
        if index == len(self._source.blocks) - 1:  # later, the output layer may be quantized
            for stream in (0, 1):
                states[stream] = self._logits(states[stream])

    def verdict(self, states: Sequence[Tensor], model: Any = None) -> dict[str, Any]:
        """What the streams say in the end.

        Args:
            states: original, rounded, quantized.
            model: the packed model if it is no longer what the third stream went through.

        Raises:
            IntegrityError: the quantized model is unusable.
        """
        full, rounded = states[0], states[1]
        quantized = self._logits(states[2]) if model is None else self._of(model)
        found = {
            "tokens": self._tokens.numel(),
            "kl": _kl(full, quantized),
            "kl_rounded": _kl(full, rounded),
            "perplexity": self._perplexity(quantized),
            "perplexity_rounded": self._perplexity(rounded),
            "perplexity_full": self._perplexity(full),
        }
        if not bool(full.isfinite().all()):
            raise IntegrityError(
                "The full-precision model itself returns NaN or infinite logits on the "
                "calibration text. Convert it to bfloat16 or float32 first."
            )
        if not bool(quantized.isfinite().all()):
            raise IntegrityError("The quantized model returns NaN or infinite logits.")
        if not found["kl"] <= FACTOR * found["kl_rounded"] + SLACK:
            raise IntegrityError(
                f"The quantized model is {found['kl']:.3g} nats per token from the original on "
                f"{found['tokens']} held-out tokens; plain rounding is {found['kl_rounded']:.3g} "
                "from it. Use more or other calibration text, more bits, or method rtn."
            )
        return {k: v if math.isfinite(v) else None for k, v in found.items()}

    def _through(
        self,
        index: int,
        block: nn.Module,
        weights: Mapping[str, Sequence[Any]],
        states: Tensor,
        schemes: Mapping[str, Sequence[QuantizedWeight]] | None = None,
    ) -> Tensor:
        """`states` behind a copy of `block` whose matrices are replaced, or rounded."""
        dtype = run_dtype(states.dtype, self._where)
        work = run_copy(as_linears(shared_copy(block)), self._where)
        for name, results in weights.items():
            weight = work.get_parameter(f"{name}.weight").data
            matrices = weight if weight.ndim == 3 else weight.unsqueeze(0)
            for e, (matrix, q) in enumerate(zip(matrices, results, strict=True)):
                if schemes is not None:
                    q = q.solve(matrix, matrix, schemes[name][e].scheme)
                matrix.copy_(q.dequantize())
        call = self._recording.calls[index][0].to(self._where, dtype)
        with torch.no_grad():
            return run_block(work, states.to(self._where, dtype), call).cpu()

    def _logits(self, states: Tensor) -> Tensor:
        source = self._source
        cpu = torch.device("cpu")
        with source.outer(), running(source.model, cpu, source.blocks), torch.no_grad():
            tied = self._recording.returns_tuple
            return logits_behind(source.model, source.blocks, self._tokens, states, tied)

    def _of(self, model: Any) -> Tensor:
        with torch.no_grad():
            ids = self._tokens.to(model.get_input_embeddings().weight.device)
            return model(input_ids=ids, use_cache=False).logits.cpu()

    def _perplexity(self, logits: Tensor) -> float:
        labels = self._tokens[:, 1:, None].to(logits.device)
        total = 0.0
        for part, own in zip(logits[:, :-1].split(ROWS, 1), labels.split(ROWS, 1), strict=True):
            total -= float(part.float().log_softmax(-1).gather(-1, own).sum())
        return math.exp(min(total / labels.numel(), 700.0))


def check_layer(report: LayerReport) -> None:
    """Refuse a layer that is no better than one of zeros.

    Raises:
        IntegrityError: names the layer.
    """
    if not report.error < 1:  # NaN is not
        raise IntegrityError(
            f"{report.name}: its relative output error is {report.error:.3g} at "
            f"{report.scheme.bits} bits: zeros would do as well. Use more bits, smaller groups or "
            f"other calibration text, or skip it (--skip '{report.name}')."
        )


def _kl(full: Tensor, other: Tensor) -> float:
    """KL(full || other), nats per token."""
    total = 0.0
    for one, two in zip(full.split(ROWS, 1), other.split(ROWS, 1), strict=True):
        p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / full[..., 0].numel()
