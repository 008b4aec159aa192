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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from llmq.adapters import as_linears, run_copy, run_dtype, shared_copy
from llmq.blocks import (
    decoder_blocks,
    head_inputs,
    keep_outputs,
    linears,
    record_calls,
    run_block,
    shared_input_groups,
)
from llmq.errors import IntegrityError, NonFiniteError, SchemeError
from llmq.moments import second_moments
from llmq.nn import STACKS, PackedLinear, is_stacked_experts
from llmq.objective import Problem, Twin, posed
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers import Solver
from llmq.solvers.awq import AWQ
from llmq.solvers.gptq import GPTQ
from llmq.store import InMemory, LayerReport, Store

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
        lm_head: whether the output layer is quantized too. If it is tied to the embeddings they
            are untied: the embeddings stay as they are.
        skip: patterns of linears to leave as they are: a module name or the end of one, with
            shell wildcards ("model.layers.0.*", "down_proj", "*.mlp.*").
    """

    scheme: QuantScheme = QuantScheme()
    solver: Solver = GPTQ()
    awq: AWQ | None = None
    skip: tuple[str, ...] = ()
    lm_head: bool = False
    match: bool = False
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)

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
        NonFiniteError: an activation is NaN or infinite.
        IntegrityError: a solver returned NaN.
    """
    check_groups(quantizable(model, recipe.lm_head), recipe)
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
    for i in range(store.start, len(blocks)):
        block = store.open(i)
        view = as_linears(shared_copy(block))  # the block's own tensors
        work = run_copy(view, where, dtype)  # what runs, and takes on quantized weights
        calls = [call.to(where, dtype) for call in recording.calls[i]]
        probe = (hidden[0][:1, :PROBE], probes.calls[i][0].to(where, dtype))
        names = {n: s for n in linears(view) if (s := recipe.scheme_for(f"{prefix}.{i}.{n}"))}
        if recipe.awq:
            recipe.awq.smooth(view, work, names, hidden, calls, probe)
        groups = shared_input_groups(work, *probe)
        twin = Twin(work, full, groups, probe) if recipe.match else None
        solved: dict[str, list[QuantizedWeight]] = {}
        reports: list[LayerReport] = []
        done: set[str] = set()
        for group in groups:
            done.update(group)
            chosen = {n: names[n] for n in group if n in names}
            if not chosen:
                continue
            problems = posed(work, group[0], hidden, calls, twin)
            _check(problems, f"{prefix}.{i}.{group[0]}")
            for name, found, results in _solve_group(view, work, chosen, problems, recipe.solver):
                solved[name] = results
                reports += [_sound(_named(report, f"{prefix}.{i}")) for report in found]
                yield from reports[-len(found) :]
            if not store.lean:
                keep_outputs(work, done, len(calls))
                if twin:
                    keep_outputs(twin.block, done, len(calls))
        for b, call in enumerate(calls):
            hidden[b] = _finite(run_block(work, hidden[b], call), f"{prefix}.{i}")
            if twin:
                full[b] = run_block(twin.block, full[b], call)
        del view, work, twin
        store.close(i, block, solved, reports)
        recording.calls[i].clear()
    if recipe.lm_head:
        with store.outer():
            inputs = head_inputs(model, blocks, batches, hidden, recording.returns_tuple)
            yield from _quantize_head(model, inputs, recipe)


def check_groups(shapes: dict[str, tuple[int, int]], recipe: Recipe) -> None:
    """Refuse a group size that does not divide some layer, with what would.

    Raises:
        SchemeError: lists the layers.
    """
    bad = {
        name: K
        for name, (_, K) in shapes.items()
        if (scheme := recipe.scheme_for(name)) and not scheme.divides(K)
    }
    if not bad:
        return
    listed = ", ".join(f"{name} (in_features={K})" for name, K in list(bad.items())[:6])
    more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
    fits = [g for g in (128, 64, 32) if all(K % g == 0 for K in bad.values())]
    ends = sorted({".".join(name.split(".")[-2:]) for name in bad})
    raise SchemeError(
        f"group_size={recipe.scheme.group_size} does not divide {listed}{more}. "
        f"Use group_size={' or '.join(map(str, [*fits, -1]))}, or skip these layers: "
        + " ".join(f"--skip '{end}'" for end in ends)
    )


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
            f"{name}: its input is NaN or infinite in calibration. The model overflows in its "
            "dtype on this text; convert it to bfloat16 or float32."
        )


def _finite(states: Tensor, block: str) -> Tensor:
    """`states`, if they are finite.

    Raises:
        NonFiniteError: names the block.
    """
    if not bool(states.isfinite().all()):
        raise NonFiniteError(
            f"{block}: its output is NaN or infinite in calibration. The model overflows in its "
            "dtype on this text; convert it to bfloat16 or float32."
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

    Rows never interact, so linears with one scheme are solved as one tall matrix. Yields per
    linear its name, and one report and one result for each of its experts (one if it has none).
    """
    for scheme in dict.fromkeys(schemes.values()):
        names = [n for n in schemes if schemes[n] == scheme]
        reports: dict[str, list[LayerReport]] = {n: [] for n in names}
        results: dict[str, list[QuantizedWeight]] = {n: [] for n in names}
        for e, problem in enumerate(problems):
            H = problem.H
            start = time.perf_counter()
            weights = [problem.target(_matrix(view, n, e).to(H.device)) for n in names]
            tall = solver.solve(torch.cat(weights), problem.moment(), scheme)
            seconds = (time.perf_counter() - start) / len(names)
            for n, W, q in zip(names, weights, _split(tall, weights), strict=True):
                _matrix(work, n, e).copy_(q.dequantize())
                label = _expert_name(n, e) if len(problems) > 1 else n
                error = relative_error(W, q, H)
                report = LayerReport(label, q.shape, scheme, error, problem.tokens, seconds)
                reports[n].append(report)
                results[n].append(q)
        for n in names:
            yield n, reports[n], results[n]


def _expert_name(stack: str, expert: int) -> str:
    parent, _, leaf = stack.rpartition(".")
    return f"{parent}.{expert}.{leaf}"


def relative_error(W: Tensor, q: QuantizedWeight, H: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = dequantized - W; 0 if the layer's output is 0."""
    W = W.float()
    delta = q.dequantize(torch.float32) - W
    size = float(((W @ H) * W).sum())
    return float(((delta @ H) * delta).sum()) / size if size > 0 else 0.0


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
