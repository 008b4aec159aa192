"""The flow: quantize a model in place, one decoder block at a time.

    record how every block is called          (blocks.record_calls; no block is computed)
    for each block:
        fold AWQ factors into it               (optional; solvers.awq)
        for each group of linears that read one tensor, in the order in which they run:
            H = second moment of that tensor   (moments; the block is run up to there)
            solve every linear of the group    (solvers)
            run with the quantized weights from here on
        put packed layers in their place       (store)

So every linear is solved for the inputs that it will really see, behind layers that are already
quantized ("true sequential"). A `Store` says where blocks come from and go to: `InMemory` is the
model itself, `stream.Streamed` reads them from files one at a time and writes them as they finish.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from llmq.adapters import as_linears, run_copy, run_dtype, shared_copy
from llmq.blocks import (
    Call,
    decoder_blocks,
    forget_outputs,
    head_inputs,
    keep_outputs,
    linears,
    record_calls,
    run_block,
    shared_input_groups,
)
from llmq.errors import IntegrityError, NonFiniteError, SchemeError
from llmq.moments import quadratic, second_moments
from llmq.nn import STACKS, PackedLinear, is_stacked_experts
from llmq.objective import Problem, Twin, posed
from llmq.retry import Effort, Retries
from llmq.scheme import QuantizedWeight, QuantScheme, check_groups
from llmq.solvers import Solver
from llmq.solvers.awq import AWQ
from llmq.solvers.gptq import GPTQ
from llmq.store import InMemory, LayerReport, Store
from llmq.tuning import ScaleTuning
from llmq.tuning_blocks import BlockTuning, tune_block

EXPLODED = 1e6  # sound blocks multiply hidden states by a thousand at most
PROBE = 32  # tokens with which structure is observed and smoothing pairs are proven


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        scheme: number format of every quantized linear.
        solver: how codes are found.
        awq: scale channels before solving, or None.
        schemes: number formats of matrices that have one of their own, by module name.
        match: ask for the full-precision outputs, given the inputs behind quantized layers
            (see `objective`); else for the outputs that these inputs have in full precision.
        block: how codes and scales of a finished block are tuned towards the full-precision
            block's output, or None; needs `match`. Reports tell of the codes before that.
        scales: how scales are tuned when the last block is finished. That is done by who calls
            `quantize`, since it needs the whole packed model (see `tuning` and `refine`).
        lm_head: whether the output layer is quantized too. If it is tied to the embeddings they
            are untied: the embeddings stay as they are.
        skip: patterns of linears to leave as they are: a module name or the end of one, with
            shell wildcards ("model.layers.0.*", "down_proj", "*.mlp.*").

    Raises:
        SchemeError: tuning without `match`.
    """

    scheme: QuantScheme = QuantScheme()
    solver: Solver = GPTQ()
    awq: AWQ | None = None
    skip: tuple[str, ...] = ()
    lm_head: bool = False
    match: bool = False
    block: BlockTuning | None = None
    scales: ScaleTuning | None = None
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.block or self.scales) and not self.match:
            raise SchemeError("Tuning compares with the full-precision stream: use match=True.")

    def scheme_for(self, name: str) -> QuantScheme | None:
        """The number format of the linear called `name`; None if it is skipped."""
        skipped = any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in self.skip)
        return None if skipped else self.schemes.get(name, self.scheme)


def quantizable(model: nn.Module, lm_head: bool = False) -> dict[str, tuple[int, int]]:
    """Names and shapes (N, K) of all matrices in the decoder blocks; stacks count once.

    With `lm_head`, the output layer too.
    """
    name, blocks = decoder_blocks(model)
    found = {}
    for i, block in enumerate(blocks):
        view = as_linears(shared_copy(block))
        for linear in linears(view):
            N, K = view.get_parameter(f"{linear}.weight").shape[-2:]
            found[f"{name}.{i}.{linear}"] = (N, K)
    if lm_head:
        head = _head_name(model)
        N, K = model.get_parameter(f"{head}.weight").shape
        found[head] = (N, K)
    return found


def input_widths(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """K of every matrix, from its (N, K)."""
    return {name: K for name, (_, K) in shapes.items()}


@dataclass
class _Solution:
    """What became of a block.

    Attributes:
        effort: how it was solved.
        runs: the block with its quantized weights and, if the full-precision stream is carried
            along, without: what each stream goes through.
        solved: per matrix or stack, one result, or one per expert.
        reports: one per matrix.
    """

    effort: Effort
    runs: list[nn.Module]
    solved: dict[str, list[QuantizedWeight]] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)

    def behind(self, run: nn.Module, states: Tensor, call: Call, effort: Effort) -> Tensor:
        """What leaves `run` if `states` (B, T, D) enter it, where these are."""
        if effort != self.effort:
            forget_outputs(run)
            run.to(effort.device)
        pieces = zip(effort.states([states]), effort.calls([call], [states]), strict=True)
        found = [
            run_block(run, piece, own).to(states.device, states.dtype) for piece, own in pieces
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass
class _BlockJob:
    """A block that is to be solved.

    Attributes:
        block: dense, with its weights.
        name: of it.
        streams: per stream, the hidden states (B, T, D) of every batch that enter it.
        calls: per batch, the rest of its arguments.
        probe: those for a few tokens.
        recipe: what to do.
        lean: whether to keep nothing that can be computed again.
        smoothed: whether channels are scaled already.
    """

    block: nn.Module
    name: str
    streams: Sequence[Sequence[Tensor]]
    calls: Sequence[Call]
    probe: Call
    recipe: Recipe
    lean: bool
    smoothed: bool = False

    def solve(self, effort: Effort) -> _Solution:
        """Solve every matrix; `block` only changes where channels are smoothed."""
        recipe, name = self.recipe, self.name
        view = as_linears(shared_copy(self.block))  # the block's own tensors
        hidden, *more = (effort.states(stream) for stream in self.streams)
        calls = effort.calls(self.calls, self.streams[0])
        dtype = hidden[0].dtype
        work = run_copy(view, effort.device, dtype)  # what runs, and takes on quantized weights
        probe = (hidden[0][:1, :PROBE], self.probe.to(effort.device, dtype))
        schemes = {n: s for n in linears(view) if (s := recipe.scheme_for(f"{name}.{n}"))}
        if recipe.awq and not self.smoothed:
            recipe.awq.smooth(view, work, schemes, hidden, calls, probe)
            self.smoothed = True
        groups = shared_input_groups(work, *probe)
        twin = Twin(work, more[0], groups, probe) if more else None
        solution = _Solution(effort, [work, twin.block] if twin else [work])
        done: set[str] = set()
        for group in groups:
            done.update(group)
            chosen = {n: schemes[n] for n in group if n in schemes}
            if not chosen:
                continue
            problems = posed(work, group[0], hidden, calls, twin)
            _check(problems, f"{name}.{group[0]}")
            for linear, found, q in _solve_group(view, work, chosen, problems, recipe.solver):
                solution.solved[linear] = q
                solution.reports += [_sound(_named(report, name)) for report in found]
            if not self.lean:
                for run in solution.runs:
                    keep_outputs(run, done, len(calls))
        if recipe.block and twin:
            wanted = [run_block(twin.block, x, c) for x, c in zip(more[0], calls, strict=True)]
            solved = tune_block(view, solution.solved, hidden, calls, wanted, recipe.block)
            solution.solved, solution.runs[0] = solved, _with(view, solved, effort, dtype)
        return solution


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
    prefix, blocks = decoder_blocks(model)
    store = store or InMemory(blocks)
    hidden, *more = streams = store.streams(2 if recipe.match else 1)
    full = more[0] if more else []  # the same, never quantized
    with store.outer():
        first = store.open(0)
        entering = deque(maxlen=1) if hidden else hidden  # those of a resumed run are further
        recording = record_calls(model, blocks, batches, first, entering)
        probes = record_calls(model, blocks, [batches[0][:1, :PROBE]], first)
        del first
    where = torch.device(device) if device is not None else hidden[0].device
    dtype = run_dtype(hidden[0].dtype, where)
    for stream in streams:
        for b, states in enumerate(stream):
            if (moved := states.to(where, dtype)) is not states:
                stream[b] = moved

    if recipe.match and not full:
        full.extend(hidden)

    yield from store.done
    retries = Retries(where)
    for i in range(store.start, len(blocks)):
        block, name = store.open(i), f"{prefix}.{i}"
        calls = recording.calls[i]
        job = _BlockJob(block, name, streams, calls, probes.calls[i][0], recipe, store.lean)
        solution = retries.run(name, job.solve)
        yield from solution.reports
        _advance(solution, name, streams, calls, retries)
        store.close(i, block, solution.solved, solution.reports)
        calls.clear()
        del block, job, solution
    if recipe.lm_head:
        with store.outer():
            inputs = head_inputs(model, blocks, batches, hidden, recording.returns_tuple)
            yield from _quantize_head(model, inputs, recipe)


def _advance(
    solution: _Solution,
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


def check_experts(model: nn.Module, recipe: Recipe) -> None:
    """Refuse to quantize one of an expert module's two stacks: they are packed together.

    Raises:
        SchemeError: names the module.
    """
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            schemes = [recipe.scheme_for(f"{name}.{stack}") for stack in STACKS]
            if any(schemes) and not all(schemes):
                raise SchemeError(
                    f"{name}: only one of {' and '.join(STACKS)} is skipped, but stacked experts "
                    f"are packed together. Skip both (--skip '{name.split('.')[-1]}.*') or none."
                )


def _quantize_head(
    model: nn.Module, inputs: Iterator[Tensor], recipe: Recipe
) -> Iterator[LayerReport]:
    """Solve the output layer for `inputs`, which the quantized blocks feed it."""
    name = _head_name(model)
    scheme = recipe.scheme_for(name)
    if scheme is None:
        return
    [(H, count)] = second_moments(inputs)
    W = model.get_parameter(f"{name}.weight").data
    start = time.perf_counter()
    q = recipe.solver.solve(W.to(H.device), H, scheme)
    seconds = time.perf_counter() - start
    packed = PackedLinear.from_quantized(q, getattr(model.get_submodule(name), "bias", None)).to(
        W.device
    )
    packed.prepare()
    model.set_output_embeddings(packed)  # type: ignore[operator]
    error = relative_error(W.to(H.device), q, H)
    yield LayerReport(name, q.shape, scheme, error, count, seconds)


def _head_name(model: nn.Module) -> str:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is head)


def _check(problems: list[Problem], name: str) -> None:
    """Refuse what is not finite.

    Raises:
        NonFiniteError: names the linear.
    """
    if not all(problem.finite() for problem in problems):
        raise NonFiniteError(
            f"{name}: its input is NaN or infinite, or too large to square. The model overflows in "
            "its dtype on this text; convert it to bfloat16 or float32."
        )


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


def _solve_group(
    view: nn.Module,
    work: nn.Module,
    schemes: dict[str, QuantScheme],
    problems: list[Problem],
    solver: Solver,
) -> Iterator[tuple[str, list[LayerReport], list[QuantizedWeight]]]:
    """Solve linears that read the same tensor and give `work` their quantized weights.

    Rows never interact, so linears with one scheme are solved as one tall matrix. `problems` is
    emptied on the way. Yields per linear its name, and one report and one result for each of its
    experts (one if it has none).
    """
    reports: dict[str, list[LayerReport]] = {n: [] for n in schemes}
    results: dict[str, list[QuantizedWeight]] = {n: [] for n in schemes}
    several = len(problems) > 1
    e = 0
    while problems:
        problem = problems.pop(0)
        H, tokens = problem.H, problem.tokens
        targets = {n: problem.target(_matrix(view, n, e).to(H.device)) for n in schemes}
        moment = problem.moment()
        del problem  # what targets are made of may be as large as what solving takes
        for scheme in dict.fromkeys(schemes.values()):
            names = [n for n in schemes if schemes[n] == scheme]
            start = time.perf_counter()
            weights = [targets.pop(n) for n in names]
            tall = solver.solve(torch.cat(weights), moment, scheme)
            seconds = (time.perf_counter() - start) / len(names)
            for n, W, q in zip(names, weights, _split(tall, weights), strict=True):
                _matrix(work, n, e).copy_(q.dequantize())
                label = _expert_name(n, e) if several else n
                error = relative_error(W, q, H)
                reports[n].append(LayerReport(label, q.shape, scheme, error, tokens, seconds))
                results[n].append(q)
        e += 1
    for n in schemes:
        yield n, reports[n], results[n]


def _with(
    view: nn.Module, solved: dict[str, list[QuantizedWeight]], effort: Effort, dtype: torch.dtype
) -> nn.Module:
    """A copy of a block to run, with quantized weights."""
    work = run_copy(view, effort.device, dtype)
    for name, results in solved.items():
        for e, q in enumerate(results):
            _matrix(work, name, e).copy_(q.dequantize())
    return work


def _expert_name(stack: str, expert: int) -> str:
    parent, _, leaf = stack.rpartition(".")
    return f"{parent}.{expert}.{leaf}"


def relative_error(W: Tensor, q: QuantizedWeight, H: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = dequantized - W; 0 if the layer's output is 0."""
    lost = size = 0.0
    for rows in q.slices():
        part = W[rows].float()
        delta = q.rows(rows).dequantize(torch.float32) - part
        size += float(quadratic(part, H).sum())
        lost += float(quadratic(delta, H).sum())
    return lost / size if size > 0 else 0.0


def _matrix(block: nn.Module, name: str, expert: int) -> Tensor:
    weight = block.get_parameter(f"{name}.weight").data
    return weight[expert] if weight.ndim == 3 else weight


def _split(q: QuantizedWeight, like: list[Tensor]) -> list[QuantizedWeight]:
    sizes = [len(W) for W in like]
    parts = zip(q.codes.split(sizes), q.scale.split(sizes), q.zero.split(sizes), strict=True)
    return [QuantizedWeight(q.scheme, *(t.contiguous() for t in part)) for part in parts]


def _named(report: LayerReport, prefix: str) -> LayerReport:
    return LayerReport(**{**vars(report), "name": f"{prefix}.{report.name}"})


def _sound(report: LayerReport) -> LayerReport:
    """`report`, if its error is a number.

    Raises:
        IntegrityError: names the layer.
    """
    if not math.isfinite(report.error):
        raise IntegrityError(
            f"{report.name}: its quantized weight is NaN or infinite: a fault of the solver. "
            f"Skip this layer (--skip '{report.name}') or use another method."
        )
    return report
