"""What was lost: perplexity, divergence from the full-precision model, agreement of top tokens.

Perplexity follows the protocol of the GPTQ paper (Frantar et al. 2022, arXiv:2210.17323): windows
that do not overlap, the mean negative log-likelihood of all tokens but the first of each window.
It depends on the window length, so the length belongs to the number. Windows are the samples of
every error bar: tokens of one window are far from independent.

Logits are looked at a slice at a time, in float32, and never kept: memory does not grow with the
text, and with most models not even one window's logits exist at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.errors import NonFiniteError, SourceError
from llmq.progress import progress_bar

_BATCH_TOKENS = 2048
_SLICE_ENTRIES = 2**23  # logits in float32 at once: 32 MiB


@dataclass(frozen=True)
class Evaluation:
    """Measurements over `windows` windows of `seq_len` tokens. An unknown value is None.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        perplexity_stderr: its standard error over windows, by the delta method.
        nll, nll_stderr: the same in nats per token.
        kl, kl_stderr: KL(reference || model) in nats per token.
        top1, top1_stderr: share of tokens where both models rate the same token highest.
        tokens: tokens scored, windows * (seq_len - 1).
        seconds: time taken.
        protocol: one sentence that says how this was measured.
        bits_per_weight: of the quantized matrices, scales and zero points included; of a model
            that is not quantized, of its weights.
        peak_memory_bytes: of this process (CPU) or of its tensors (GPU).
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    nll_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    top1: float | None
    top1_stderr: float | None
    windows: int
    seq_len: int
    tokens: int
    seconds: float
    protocol: str = ""
    bits_per_weight: float | None = None
    peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The known values, ready for `json.dumps`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    *,
    progress: bool = False,
) -> Evaluation:
    """Measure a causal language model of transformers on windows of token ids.

    Args:
        model: any causal LM; its mode and parameters are not changed.
        windows: int64 (windows, seq_len), for instance of `calibrate.token_windows`.
        reference: the full-precision model, for KL and top-1 agreement.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        NonFiniteError: the model's likelihoods are NaN or infinite.
        SourceError: the two models have different vocabularies.
    """
    start = time.perf_counter()
    seq_len = windows.shape[1]
    models = [model] if reference is None else [model, reference]
    slicers = [_slicer(each, windows[:1, : min(8, seq_len)]) for each in models]
    rows = []  # per batch (windows, 1 or 3)
    with progress_bar("Evaluating", len(windows), show=progress) as advance:
        for ids in windows.split(max(1, _BATCH_TOKENS // seq_len)):
            done = sum(map(len, rows))
            rows.append(_window_means(ids, [slicer(ids) for slicer in slicers]))
            advance(done + len(ids))
            if not rows[-1].isfinite().all():
                raise NonFiniteError(
                    f"{type(model).__name__}: likelihoods are NaN or infinite in windows {done} "
                    f"to {done + len(ids) - 1}. Check the weights, or load it in bfloat16."
                )
    values = torch.cat(rows)  # (windows, 1 or 3)
    mean = values.mean(0).tolist() + [None] * (3 - values.shape[1])
    error: list[Any] = [None] * 3
    if len(values) > 1:
        error[: values.shape[1]] = (values.std(0) / math.sqrt(len(values))).tolist()
    perplexity = math.exp(min(mean[0], 700.0))  # stays a float for the worst of models
    return Evaluation(
        perplexity=perplexity,
        perplexity_stderr=None if error[0] is None else perplexity * error[0],
        nll=mean[0],
        nll_stderr=error[0],
        kl=mean[1],
        kl_stderr=error[1],
        top1=mean[2],
        top1_stderr=error[2],
        windows=len(values),
        seq_len=seq_len,
        tokens=len(values) * (seq_len - 1),
        seconds=time.perf_counter() - start,
    )


def protocol(text: str, windows: int, seq_len: int, *, join: str, bos: bool) -> str:
    """How a perplexity was measured, in one sentence."""
    rows = " as rows joined by blank lines (GPTQ paper)" if join == "wikitext" else ""
    first = "each starting with BOS" if bos else "no BOS"
    return (
        f"{text}{rows}: {windows} non-overlapping windows of {seq_len} tokens, {first}, "
        f"{windows * (seq_len - 1)} tokens scored; +- is one standard error over windows."
    )


Slicer = Callable[[Tensor], Iterator[Tensor]]


def _slicer(model: nn.Module, probe: Tensor) -> Slicer:
    """A function from ids (B, L) to the float32 logits of [:, :-1], as slices (rows, V).

    The head runs slice by slice if that provably gives the model's own logits; a model that caps
    or scales its logits after the head gives all logits of a batch at once.
    """
    device = next(model.parameters()).device
    base, head = getattr(model, "base_model", model), model.get_output_embeddings()  # type: ignore[operator]
    probe = probe.to(device)
    logits = model(input_ids=probe, use_cache=False).logits
    rows = max(1, _SLICE_ENTRIES // logits.shape[-1])
    proven: nn.Module | None = None
    if base is not model and head is not None:
        hidden = base(input_ids=probe, use_cache=False)[0]
        if hidden.shape[:2] == probe.shape and torch.equal(head(hidden), logits):
            proven = head

    def slices(ids: Tensor) -> Iterator[Tensor]:
        ids = ids.to(device)
        if proven is not None:
            states = base(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
            for part in states.split(rows):
                yield proven(part).float()
        else:
            every = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            for part in every.split(rows):
                yield part.float()

    return slices


def _window_means(ids: Tensor, logits: list[Iterator[Tensor]]) -> Tensor:
    """Mean per window of NLL, and with two models KL and top-1 agreement: float64 (B, 1 or 3)."""
    targets = ids[:, 1:].flatten()
    done, parts = 0, []
    for model, *others in zip(*logits, strict=True):
        rows = len(model)
        log_q = F.log_softmax(model, -1)  # (rows, V)
        target = targets[done : done + rows].to(log_q.device)
        columns = [-log_q.gather(1, target[:, None])[:, 0]]
        for other in others:
            if other.shape != model.shape:
                raise SourceError(
                    f"The reference has {other.shape[-1]} tokens in its vocabulary and the model "
                    f"{model.shape[-1]}: they cannot be compared."
                )
            log_p = F.log_softmax(other.to(log_q.device), -1)
            columns.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            columns.append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        parts.append(torch.stack(columns, 1).double().cpu())
        done += rows
    return torch.cat(parts).unflatten(0, (len(ids), -1)).mean(1)
