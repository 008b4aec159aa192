"""How much the loss feels the outputs of each linear: their second moments, one block at a time.

Changing the outputs y of a linear by e costs, to second order, e G e^T / 2 nats per token, with
G = mean g g^T over tokens and g the gradient of the log-likelihood by y (the Fisher information).
Together with H, the second moment of what the linear reads, this is K-FAC (Martens and Grosse
2015, arXiv 1503.05671); YAQA (Tseng et al. 2025, arXiv 2505.22988) rounds by it, and so does
`solvers.feedback`. Labels are drawn from the model's own predictions.

One pass forwards through the full-precision model and one back, each with one block in memory at a
time: what enters every block is put aside on the way, and taken from there on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.adapters import RoutedLinear, as_linears, run_copy, run_dtype, running, shared_copy
from llmq.blocks import (
    decoder_blocks,
    drawn_loss,
    hooks,
    linears,
    logits_behind,
    record_calls,
    run_block,
)
from llmq.calls import Call
from llmq.errors import NonFiniteError
from llmq.moments import second_moments, weight_roots
from llmq.recipe import Recipe
from llmq.retry import Effort, Retries
from llmq.store import Store, outputs_of

LOGITS = 1 << 23  # that are computed at once
MOST = 50.0  # times the mean |g|^2 of a window is as much as a token can count


@dataclass(frozen=True)
class Window:
    """A window of calibration text.

    Attributes:
        number: of it, over all processes of the run.
        batch, row: where it is.
    """

    number: int
    batch: int
    row: int


def spacing(available: int, tokens: int) -> int:
    """Of how many windows one is taken, for about `tokens` of all tokens."""
    return max(1, round(available / tokens))


def windows(batches: Sequence[Tensor], tokens: int) -> list[Window]:
    """This process's windows of those that make up about `tokens` tokens, evenly spread.

    Args:
        batches: int64 (B, T) each, every n-th window of the text for n processes.
        tokens: in all processes together; one window in each is taken at least.
    """
    own = [(b, row) for b, batch in enumerate(batches) for row in range(len(batch))]
    processes, first = ranks.count(), ranks.number()
    every = spacing(processes * sum(batch.numel() for batch in batches), tokens)
    found = [Window(first + processes * i, *where) for i, where in enumerate(own)]
    # Not always the same one of so many: else only some of the processes would have any.
    return [w for w in found if w.number % every == w.number // every % every] or found[:1]


def prepare(
    model: nn.Module,
    batches: Sequence[Tensor],
    recipe: Recipe,
    device: torch.device | str | None,
    store: Store,
    passed: Callable[[int], None] = lambda steps: None,
    seed: int = 0,
) -> None:
    """Put aside, for every block, the output moments of its linears, see `store.outputs_of`.

    Those of linears whose outputs are no more than the hidden states are wide, float32 (N, N), by
    the linear's name; experts have none. Does nothing if the recipe needs none, or if `store` has
    them.

    Args:
        model: its blocks may be without weights.
        batches: token ids, int64 (B, T) each.
        recipe: says which linears will be quantized, and by how much text they are judged.
        device: where blocks run (default: where the model is).
        store: gives blocks and keeps what is put aside.
        passed: is called with the number of finished steps, two per block, and before the first.
        seed: of the labels that are drawn.

    Raises:
        NonFiniteError: logits or gradients are NaN or infinite.
    """
    if recipe.feedback is None or store.prepared:
        return
    prefix, blocks = decoder_blocks(model)
    chosen = windows(batches, recipe.feedback.tokens)
    with store.outer():
        recording = record_calls(model, blocks, batches, store.look(0))
    where = torch.device(device) if device is not None else recording.hidden[0].device
    retries = Retries(where)
    dtype = run_dtype(recording.hidden[0].dtype, where)
    states = [recording.hidden[w.batch][w.row : w.row + 1].to(where, dtype) for w in chosen]
    recording.hidden.clear()

    def calls(index: int) -> list[Call]:
        pieces = {
            b: recording.calls[index][b].split(len(batches[b])) for b in {w.batch for w in chosen}
        }
        return [pieces[w.batch][w.row] for w in chosen]

    passed(0)
    for i in range(len(blocks)):
        numbered = dict(zip(_numbers(chosen), states, strict=True))
        store.put_aside(f"states-{i}-{ranks.number()}", numbered)
        step = partial(forwards, store.look(i), states, calls(i))
        states = retries.run(f"{prefix}.{i}", step)
        passed(i + 1)
    gradients = []
    with store.outer(), running(model, where, blocks):
        for w, x in zip(chosen, states, strict=True):
            ids = batches[w.batch][w.row : w.row + 1]
            tied = recording.returns_tuple
            gradients.append(_of_loss(model, blocks, ids, x, tied, seed + w.number))
    width = states[0].shape[-1]
    for i in reversed(range(len(blocks))):
        name, entering = f"{prefix}.{i}", f"states-{i}-{ranks.number()}"
        saved = store.take(entering)
        states = [saved[number].to(where) for number in _numbers(chosen)]
        own = partial(_narrow, prefix=name, width=width, recipe=recipe)
        step = partial(_backwards, store.look(i), states, calls(i), gradients, own)
        moments, gradients = retries.run(name, step, together=True)
        for linear, G in moments.items():
            if not bool(G.isfinite().all()):
                raise NonFiniteError(f"{name}.{linear}: a gradient is NaN or infinite.")
        if ranks.number() == 0:
            store.put_aside(outputs_of(i), moments)
        store.forget(entering)
        passed(2 * len(blocks) - i)
    store.ready()


def _numbers(chosen: Sequence[Window]) -> list[str]:
    return [str(window.number) for window in chosen]


def _narrow(view: nn.Module, prefix: str, width: int, recipe: Recipe) -> dict[str, nn.Module]:
    """Linears of a block whose outputs are at most `width` numbers."""
    return {
        name: linear
        for name, linear in linears(view).items()
        if not isinstance(linear, RoutedLinear)
        and len(linear.get_parameter("weight")) <= width
        and recipe.scheme_for(f"{prefix}.{name}")
    }


def _run(block: nn.Module, effort: Effort) -> nn.Module:
    return run_copy(as_linears(shared_copy(block)), effort.device).requires_grad_(False)


@torch.no_grad()
def forwards(
    block: nn.Module, states: Sequence[Tensor], calls: Sequence[Call], effort: Effort
) -> list[Tensor]:
    """What leaves a block, one window after the other."""
    run, dtype = _run(block, effort), run_dtype(states[0].dtype, effort.device)
    return [
        run_block(run, x.to(effort.device, dtype), call.to(effort.device, dtype)).to(x.device)
        for x, call in zip(states, calls, strict=True)
    ]


def _backwards(
    block: nn.Module,
    states: Sequence[Tensor],
    calls: Sequence[Call],
    gradients: Sequence[Tensor],
    narrow: Callable[[nn.Module], Mapping[str, nn.Module]],
    effort: Effort,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The output moments of a block, and the gradients of the loss by what enters it."""
    run, dtype = _run(block, effort), run_dtype(states[0].dtype, effort.device)
    chosen = narrow(run)
    seen: dict[str, Tensor] = {}

    def watch(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(seen.__setitem__, name))

    def back() -> Iterator[dict[str, Tensor]]:
        for x, call, gradient in zip(states, calls, gradients, strict=True):
            seen.clear()
            own = x.to(effort.device, dtype).requires_grad_()
            with torch.enable_grad():
                out = run_block(run, own, call.to(effort.device, dtype))
            [before] = torch.autograd.grad(out, own, gradient.to(effort.device, dtype))
            entering.append(before.to(x.device))
            yield seen

    entering: list[Tensor] = []
    with hooks(*(m.register_forward_hook(partial(watch, n)) for n, m in chosen.items())):
        found = second_moments([_rows(now, n, chosen[n]) for n in chosen] for now in back())
    return dict(zip(chosen, (G for G, _ in found), strict=True)), entering


def _rows(seen: Mapping[str, Tensor], name: str, like: nn.Module) -> Tensor:
    """Gradients (T, N) of a window, the largest ones capped; none if the linear did not run."""
    if name not in seen:
        return like.get_parameter("weight").new_zeros(0, len(like.get_parameter("weight")))
    rows = seen[name].flatten(0, -2).float()
    return rows * weight_roots(rows, MOST)


def _of_loss(
    model: nn.Module,
    blocks: nn.ModuleList,
    ids: Tensor,
    states: Tensor,
    returns_tuple: bool,
    seed: int,
) -> Tensor:
    """The gradient of the loss on drawn labels by what leaves the last block, (1, T, D)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    step = max(1, LOGITS // len(head.weight))
    generator = torch.Generator(states.device).manual_seed(seed)
    found = []
    for tokens, piece in zip(ids.split(step, 1), states.detach().split(step, 1), strict=True):
        own = piece.requires_grad_()
        with torch.enable_grad():
            logits = logits_behind(model, blocks, tokens, own, returns_tuple)
            loss = drawn_loss(logits, generator)
        found += torch.autograd.grad(loss, own)
    return torch.cat(found, 1)
