"""The flow: quantize a model in place, one decoder block at a time.

    record how every block is called          (blocks.record_calls; no block is computed)
    measure how the loss feels their outputs  (curvature; optional)
    for each block:
        solve its matrices                     (blockwise)
        carry the hidden states through it, with the quantized weights
        put packed layers in their place       (store)

So every linear is solved for the inputs that it will really see, behind layers that are already
quantized ("true sequential"). A `Store` says where blocks come from and go to: `InMemory` is the
model itself, `stream.Streamed` reads them from files one at a time and writes them as they finish.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, MutableSequence, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llmq.adapters import run_dtype
from llmq.blocks import decoder_blocks, head_inputs, record_calls
from llmq.blockwise import PROBE, BlockJob, Solution, relative_error
from llmq.calls import Call
from llmq.curvature import prepare
from llmq.errors import NonFiniteError
from llmq.moments import second_moments
from llmq.nn import PackedEmbedding, linear_from
from llmq.recipe import (
    Recipe,
    check_experts,
    embedding_scheme,
    head_name,
    input_widths,
    quantizable,
)
from llmq.retry import Retries
from llmq.scheme import QuantScheme, check_groups
from llmq.store import InMemory, LayerReport, Store, outputs_of

EXPLODED = 1e6  # sound blocks multiply hidden states by a thousand at most


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Sequence[Tensor],
    recipe: Recipe,
    device: torch.device | str | None = None,
    store: Store | None = None,
) -> Iterator[LayerReport]:
    """Quantize `model` in place; yield one report per matrix, in the order they are solved.

    Args:
        model: a causal language model of transformers, or one built like it.
        batches: calibration tokens, int64 (B, T) each; batches may differ in shape.
        recipe: what to do.
        device: where blocks are run and solved (default: where the model is).
        store: where blocks come from and go to (default: the model itself).

    Raises:
        SchemeError: the group size does not divide a layer; nothing has been changed then.
        NonFiniteError: an activation is NaN, infinite or explodes.
        IntegrityError: a solver returned NaN.
    """
    check_groups(input_widths(quantizable(model, recipe.lm_head)), recipe.scheme_for)
    check_experts(model, recipe)
    embeddings = embedding_scheme(model, recipe)
    prefix, blocks = decoder_blocks(model)
    store = store or InMemory(blocks)
    prepare(model, batches, recipe, device, store)
    hidden, *more = streams = store.streams(2 if recipe.match else 1)
    full = more[0] if more else []  # the same, never quantized
    with store.outer():
        first = store.open(0)
        entering = deque(maxlen=1) if hidden else hidden  # those of a resumed run are further
        recording = record_calls(model, blocks, batches, first, entering)
        probes = record_calls(model, blocks, [batches[0][:1, :PROBE]], first)
        del first
    where = torch.device(device) if device is not None else hidden[0].device
    for stream in streams:
        _move(stream, where)
    if recipe.match and not full:
        full.extend(hidden)

    yield from store.done
    retries = Retries(where)
    for i in range(store.start, len(blocks)):
        block, name = store.open(i), f"{prefix}.{i}"
        calls = recording.calls[i]
        outputs = store.take(outputs_of(i)) if recipe.feedback else {}
        job = BlockJob(block, name, streams, calls, probes.calls[i][0], recipe, store.lean, outputs)
        solution = retries.run(name, job.solve, together=True)
        yield from solution.reports
        _advance(solution, name, streams, calls, retries)
        store.close(i, block, solution.solved, solution.reports)
        calls.clear()
        del block, job, solution, outputs
    if recipe.lm_head:
        with store.outer():
            inputs = head_inputs(model, blocks, batches, hidden, recording.returns_tuple)
            yield from _quantize_head(model, inputs, recipe)
    for name, scheme in embeddings.items():
        with store.outer():
            yield _round_embeddings(model, name, scheme, batches)


def _move(stream: MutableSequence[Tensor], where: torch.device) -> None:
    """Bring hidden states to where blocks run, in the dtype in which they run there."""
    for b, states in enumerate(stream):
        if (moved := states.to(where, run_dtype(states.dtype, where))) is not states:
            stream[b] = moved


def _advance(
    solution: Solution,
    name: str,
    streams: Sequence[MutableSequence[Tensor]],
    calls: Sequence[Call],
    retries: Retries,
) -> None:
    """Carry the streams through the block `name`, the full-precision one first; it runs no more."""
    for run, stream in reversed(list(zip(solution.runs, streams, strict=True))):
        for b, call in enumerate(calls):
            step = partial(solution.behind, run, stream[b], call)
            stream[b] = _sane(retries.run(name, step, solution.effort), stream[b], name)
    solution.runs.clear()


def _quantize_head(
    model: nn.Module, inputs: Iterator[Tensor], recipe: Recipe
) -> Iterator[LayerReport]:
    """Solve the output layer for `inputs`, which the quantized blocks feed it."""
    name = head_name(model)
    scheme = recipe.scheme_for(name)
    if scheme is None:
        return
    [(H, count)] = second_moments(inputs)
    W = model.get_parameter(f"{name}.weight").data
    start = time.perf_counter()
    q = recipe.solver.solve(W.to(H.device), H, scheme)
    seconds = time.perf_counter() - start
    packed = linear_from(q, getattr(model.get_submodule(name), "bias", None)).to(W.device)
    packed.prepare()
    model.set_output_embeddings(packed)  # type: ignore[operator]
    error = relative_error(W.to(H.device), q, H)
    yield LayerReport(name, q.shape, scheme, error, count, seconds)


def _round_embeddings(
    model: nn.Module, name: str, scheme: QuantScheme, batches: Sequence[Tensor]
) -> LayerReport:
    """Pack the input embeddings; the error is that of the rows that calibration looks up."""
    start = time.perf_counter()
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    ids, counts = torch.cat([batch.flatten() for batch in batches]).unique(return_counts=True)
    ids, counts = ids.to(table.weight.device), counts.to(table.weight.device, torch.float64)
    W = table.weight[ids].float()
    packed = PackedEmbedding.from_embedding(table, scheme)
    model.set_submodule(name, packed)
    lost, whole = (t.square().sum(1).double() @ counts for t in (packed.rows(ids).float() - W, W))
    shape = (packed.weight.shape[0], packed.weight.shape[1])
    error, tokens = float(lost / whole), int(counts.sum())
    return LayerReport(name, shape, scheme, error, tokens, time.perf_counter() - start)


def _sane(states: Tensor, before: Tensor, block: str) -> Tensor:
    """`states` behind a block, if they are finite and not out of all proportion to those `before`.

    Raises:
        NonFiniteError: names the block.
    """
    size, entered = (
        float(torch.linalg.vector_norm(t, dtype=torch.float32)) for t in (states, before)
    )
    if not bool(states.isfinite().all()):
        raise NonFiniteError(
            f"{block}: its output is NaN or infinite in calibration. The model overflows in its "
            "dtype on this text; convert it to bfloat16 or float32."
        )
    growth = size / max(entered, 1.0)
    if growth > EXPLODED:
        raise NonFiniteError(
            f"{block}: its output is {growth:.1g} times as large as its input in "
            "calibration: it explodes. A weight of this block is damaged, or its config.json is "
            "of another model."
        )
    return states
