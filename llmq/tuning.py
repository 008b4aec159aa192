"""Tune the scales of a whole quantized model, codes as they are, until its answers are nearest.

Solvers see one layer at a time. Here the packed model runs as a whole, and its group scales s move
along the gradient of the mean over tokens of

    KL(full || quantized) = sum_v p_v (log p_v - log q_v)

p and q the next-token probabilities of the full-precision and the quantized model. Codes and zero
points are frozen, so the checkpoint keeps its layout; this is the end-to-end phase of EfficientQAT
(Chen et al. 2024, arXiv:2407.11062, section 3.3) with KL instead of the language-model loss.

Scales are s exp(theta), rounded to the dtype in which they are stored; the gradient passes straight
through the rounding. Adam moves theta, the less the more bits a matrix has: what matters is how far
weights move in steps of their grid. Many steps on little text gain more than few on much, and with
little momentum: it takes as long to find its direction as there are steps. Now and then held-out
text judges the rounded scales, and the best ones that it saw win. The start is among them: the
result is never worse there.

Memory: about a byte per packed weight, everything else in float32 (bfloat16 on a GPU), and the
activations of one step in all layers. The whole model must fit on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.errors import NonFiniteError
from llmq.progress import progress_bar
from llmq.tunable import Tunable, tunable

BETAS, EPSILON = (0.7, 0.95), 1e-12  # gradients per scale are tiny in large models
LOGITS = 2**25  # of one micro-batch at most, unless a single window has more

Answers = Callable[[int, slice], Tensor]  # batch, its rows -> full-precision logits (B, T, V)


@dataclass(frozen=True)
class ScaleTuning:
    """How scales are tuned.

    Args:
        steps: of Adam.
        tokens: of calibration text per step, in whole windows; one at least.
        rate: of learning, relative change per step of a scale with 2 bits, and half as much for
            every further bit; it rises in 2 steps and then falls to 0 along a cosine.
        every: steps between two looks at held-out text.
        patience: looks without progress after which it ends.
    """

    steps: int = 240
    tokens: int = 512
    rate: float = 6e-3
    every: int = 30
    patience: int = 3

    def rate_at(self, step: int, bits: int) -> float:
        """The rate of step 0, 1, ... for scales of a matrix with so many bits."""
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * 2.0 ** (2 - bits) * min(1.0, (step + 1) / 2) * fall


@dataclass
class Progress:
    """Where tuning is: all that is needed to go on in the very same way.

    Attributes:
        step: how many steps are done.
        start: held-out KL before the first, nats per token.
        best: the smallest held-out KL so far.
        stale: looks since then.
        tensors: "theta" and "best" (what it was then), "first" and "second" moments of its
            gradient: float32 (P,), all scales of the model in one row.
    """

    step: int = 0
    start: float = math.inf
    best: float = math.inf
    stale: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {"step": self.step, "start": self.start, "best": self.best, "stale": self.stale}


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) per token, float32 (B, T), of logits (B, T, V)."""
    p, q = full.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


class _Run:
    """The model, the text, and how far it is from the full-precision answers."""

    def __init__(
        self,
        model: Any,
        batches: Sequence[Tensor],
        answers: Answers,
        layers: Sequence[Tunable],
        tokens: int,
    ):
        self.model, self.batches, self.answers, self.layers = model, batches, answers, layers
        self.sizes = [layer.theta.numel() for layer in layers]
        self.at_once = LOGITS // model.config.get_text_config().vocab_size
        self.device = model.get_input_embeddings().weight.device
        training = range(len(batches) - 1)
        self.training = [(b, rows) for b in training for rows in self.pieces(b, tokens)]

    def pieces(self, b: int, tokens: int, within: slice | None = None) -> Iterator[slice]:
        """Rows of a batch, or `within` it, with so many tokens in all, if a row has not more."""
        rows, length = self.batches[b].shape
        whole, step = within or slice(0, rows), max(1, tokens // length)
        for start in range(whole.start, whole.stop, step):
            yield slice(start, min(start + step, whole.stop))

    def misses(self, b: int, rows: slice) -> Tensor:
        """KL per token (B, T) of rows of a batch."""
        with torch.no_grad():
            full = self.answers(b, rows).to(self.device)
        ids = self.batches[b][rows].to(self.device)
        return divergence(full, self.model(input_ids=ids, use_cache=False).logits)

    @torch.no_grad()
    def judge(self) -> float:
        """Mean KL on held-out text."""
        last = len(self.batches) - 1
        pieces = self.pieces(last, self.at_once)
        total = sum(float(self.misses(last, rows).double().sum()) for rows in pieces)
        return total / self.batches[last].numel()

    def gradient(self, step: int) -> Tensor:
        """Of the mean KL of the text of a step with respect to all thetas, float32 (P,)."""
        turn, place = divmod(step, len(self.training))
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(turn))
        b, whole = self.training[int(order[place])]
        tokens = self.batches[b][whole].numel()
        for rows in self.pieces(b, self.at_once, whole):
            (self.misses(b, rows).sum() / tokens).backward()
        parts = []
        for layer in self.layers:
            grad = layer.theta.grad  # None for an expert that no token reached
            parts.append((torch.zeros_like(layer.theta) if grad is None else grad).flatten())
            layer.theta.grad = None
        return torch.cat(parts)

    def spread(self, values: Sequence[float]) -> Tensor:
        """One value per layer for each of its thetas, float32 (P,)."""
        return torch.tensor(values).repeat_interleave(torch.tensor(self.sizes)).to(self.device)

    def put(self, theta: Tensor) -> None:
        """Let the layers have these thetas (P,)."""
        for layer, part in zip(self.layers, theta.split(self.sizes), strict=True):
            layer.theta.data = part.view_as(layer.theta).clone()


def tune_scales(
    model: Any,
    batches: Sequence[Tensor],
    answers: Answers,
    how: ScaleTuning,
    *,
    begun: Progress | None = None,
    keep: Callable[[Progress], None] = lambda progress: None,
    show: bool = False,
) -> Progress:
    """Tune the scales of a packed model in place.

    Args:
        model: a causal language model with packed modules, all on one device.
        batches: token ids, int64 (B, T) each. The last one only judges: it must be text that the
            codes were not solved on, which is nearer to the full model's answers than any other.
        answers: the full-precision logits (B, T, V) of rows of a batch.
        how: see there.
        begun: where an earlier call was when it was stopped.
        keep: is given the progress at every look at held-out text.
        show: a bar on standard error if that is a terminal.

    Returns:
        what `keep` was given last. With a single batch nothing can be held out, and nothing is
        changed.

    Raises:
        NonFiniteError: the quantized model's answers on held-out text are NaN or infinite.
    """
    progress = begun or Progress()
    if len(batches) < 2:
        return progress
    with tunable(model) as made, torch.enable_grad():
        layers = [layer for stack in made.values() for layer in stack]
        run = _Run(model, batches, answers, layers, how.tokens)
        tensors = progress.tensors
        if begun is None:
            progress.start = progress.best = run.judge()
            theta = torch.cat([layer.theta.detach().flatten() for layer in run.layers])
            tensors |= {k: theta.clone() for k in ("theta", "best", "first", "second")}
        if not math.isfinite(progress.start):
            raise NonFiniteError("The quantized model returns NaN or infinite logits.")
        run.put(tensors["theta"])
        with progress_bar("Tuning scales", how.steps, show=show, before=progress.step) as advance:
            while progress.step < how.steps and progress.stale < how.patience:
                rates = run.spread([how.rate_at(progress.step, layer.bits) for layer in layers])
                _adam(tensors, run.gradient(progress.step), progress.step, rates)
                run.put(tensors["theta"])
                progress.step += 1
                if progress.step % how.every == 0 or progress.step == how.steps:
                    _look(progress, run.judge())
                    keep(progress)
                advance(progress.step)
        run.put(tensors["best"])
    return progress


def _adam(tensors: dict[str, Tensor], grad: Tensor, step: int, rates: Tensor) -> None:
    """One step of theta and its moments, at a rate per theta; in place."""
    first, second = tensors["first"], tensors["second"]
    first.lerp_(grad, 1 - BETAS[0])
    second.lerp_(grad.square(), 1 - BETAS[1])
    ahead = first / (1 - BETAS[0] ** (step + 1))
    spread = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
    tensors["theta"].sub_(ahead.div_(spread).mul_(rates))


def _look(progress: Progress, kl: float) -> None:
    """Take note of what held-out text says; NaN is no progress."""
    if kl < progress.best:
        progress.best, progress.stale = kl, 0
        progress.tensors["best"] = progress.tensors["theta"].clone()
    else:
        progress.stale += 1
