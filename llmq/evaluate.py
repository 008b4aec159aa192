"""What was lost: perplexity, divergence from the full-precision model, agreement of top tokens.

Perplexity follows the protocol of the GPTQ paper (Frantar et al. 2022, arXiv:2210.17323): windows
that do not overlap, the mean negative log-likelihood of all tokens but the first of each window.
It depends on the window length, so the length belongs to the number. Windows are the samples of
every error bar: tokens of one window are far from independent.

Logits are looked at a slice at a time, in float32, and never kept: memory does not grow with the
text, and with most models not even one window's logits exist at once.

Two models read the same windows, so their difference is measured window by window: what makes a
window hard cancels, and the error bar of the difference is far smaller than that of either
perplexity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.errors import CalibrationError, NonFiniteError, SourceError
from llmq.progress import progress_bar

_BATCH_TOKENS = 2048
_SLICE_ENTRIES = 2**23  # logits in float32 at once: 32 MiB
_KL_EDGES = tuple(10 ** (k / 4) for k in range(-24, 9))  # 1e-6 to 100 nats, 4 bins per decade
_RESAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Measurements over `windows` windows of `seq_len` tokens. An unknown value is None.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        perplexity_stderr: its standard error over windows, by the delta method.
        nll, nll_stderr: the same in nats per token.
        kl, kl_stderr: KL(reference || model) in nats per token.
        top1, top1_stderr: share of tokens where both models rate the same token highest.
        reference_perplexity: of the reference on the same tokens.
        nll_difference, nll_difference_stderr: model - reference, in nats per token; the error is
            that of paired windows.
        nll_difference_95: 95% interval of that difference: percentile bootstrap over windows
            (Efron 1979), 2000 resamples with a fixed seed.
        kl_histogram: tokens by their KL: `edges` (n + 1) in nats, `counts` (n); tokens below the
            first edge are in the first bin, those above the last in the last.
        tokens: tokens scored.
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
    reference_perplexity: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    nll_difference_95: tuple[float, float] | None = None
    kl_histogram: dict[str, list[float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The known values, ready for `json.dumps`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    *,
    first: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a causal language model of transformers on windows of token ids.

    Args:
        model: any causal LM; its mode and parameters are not changed.
        windows: int64 (windows, seq_len), for instance of `calibrate.token_windows`.
        reference: the full-precision model, for KL, top-1 agreement and paired differences.
        first: in every window only tokens after this position are scored; those up to it are
            context. 0 scores all that have a predecessor.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        NonFiniteError: the model's likelihoods are NaN or infinite.
        SourceError: the two models have different vocabularies.
        CalibrationError: `first` leaves no token to score.
    """
    start = time.perf_counter()
    seq_len = windows.shape[1]
    models = [model] if reference is None else [model, reference]
    slicers = [_slicer(each, windows[:1, : min(8, seq_len)]) for each in models]
    if not 0 <= first < seq_len - 1:
        raise CalibrationError(f"first={first}: windows of {seq_len} tokens leave none to score.")
    values, histogram = _window_values(type(model).__name__, slicers, windows, first, progress)
    found = Evaluation(
        **_moments("nll", values[:, 0]),
        perplexity=_exp(float(values[:, 0].mean())),
        perplexity_stderr=None,
        kl=None,
        kl_stderr=None,
        top1=None,
        top1_stderr=None,
        windows=len(values),
        seq_len=seq_len,
        tokens=len(values) * (seq_len - 1 - first),
        seconds=time.perf_counter() - start,
    )
    if found.nll_stderr is not None:
        found = replace(found, perplexity_stderr=found.perplexity * found.nll_stderr)
    if reference is None:
        return found
    difference = values[:, 0] - values[:, 3]
    return replace(
        found,
        **_moments("kl", values[:, 1]),
        **_moments("top1", values[:, 2]),
        **_moments("nll_difference", difference),
        reference_perplexity=_exp(float(values[:, 3].mean())),
        nll_difference_95=bootstrap_interval(difference) if len(values) > 1 else None,
        kl_histogram={"edges": list(_KL_EDGES), "counts": histogram.tolist()},
    )


def bootstrap_interval(values: Tensor, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values` (n,), drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)  # (resamples,)
    tail = (1 - 0.95) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _moments(name: str, values: Tensor) -> dict[str, Any]:
    """Mean and standard error over windows, under the names of `Evaluation`."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_stderr": error}


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # stays a float for the worst of models


def _histogram(kl: Tensor) -> Tensor:
    """How many values (n,) fall between neighbours of _KL_EDGES; the ends take what is beyond."""
    edges = torch.tensor(_KL_EDGES[1:-1], dtype=kl.dtype)
    return torch.bincount(torch.bucketize(kl.contiguous(), edges), minlength=len(_KL_EDGES) - 1)


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


def _window_values(
    name: str, slicers: list[Slicer], windows: Tensor, first: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Means of `_token_values` over every window, (windows, 1 or 4), and the histogram of KL.

    Raises:
        NonFiniteError: the likelihoods of the model `name` are NaN or infinite.
    """
    rows = []  # per batch (windows, 1 or 4)
    histogram = torch.zeros(len(_KL_EDGES) - 1, dtype=torch.int64)
    with progress_bar("Evaluating", len(windows), show=progress) as advance:
        for ids in windows.split(max(1, _BATCH_TOKENS // windows.shape[1])):
            done = sum(map(len, rows))
            tokens = _token_values(ids, [slicer(ids) for slicer in slicers])[:, first:]
            rows.append(tokens.mean(1))
            advance(done + len(ids))
            if not rows[-1].isfinite().all():
                raise NonFiniteError(
                    f"{name}: likelihoods are NaN or infinite in windows {done} "
                    f"to {done + len(ids) - 1}. Check the weights, or load it in bfloat16."
                )
            if len(slicers) > 1:
                histogram += _histogram(tokens[..., 1].flatten())
    return torch.cat(rows), histogram


def _token_values(ids: Tensor, logits: list[Iterator[Tensor]]) -> Tensor:
    """NLL of every token but the first, and with two models KL, top-1, NLL of the second.

    float64 (B, L - 1, 1 or 4) on the CPU.
    """
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
            columns.append(-log_p.gather(1, target[:, None])[:, 0])
        parts.append(torch.stack(columns, 1).double().cpu())
        done += rows
    return torch.cat(parts).unflatten(0, (len(ids), -1))
