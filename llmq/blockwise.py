"""Solve one decoder block.

fold AWQ factors into it               (optional; solvers.awq)
for each group of linears that read one tensor, in the order in which they run:
    H = second moment of that tensor   (moments; the block is run up to there)
    solve every linear of the group    (solvers; each process of a run its part: division)
    run with the quantized weights from here on
tune codes and scales together         (optional; tuning_blocks)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq import ranks
from llmq.adapters import as_linears, run_copy, shared_copy
from llmq.blocks import linears, run_block, shared_input_groups
from llmq.calls import Call
from llmq.division import Piece, Solved, divide, exchange
from llmq.errors import IntegrityError, NonFiniteError
from llmq.kept import forget_outputs, keep_outputs
from llmq.moments import damped, quadratic
from llmq.objective import Matching, Problem, Twin, posed
from llmq.recipe import Recipe
from llmq.retry import Effort
from llmq.scheme import QuantizedWeight, QuantScheme, empty, joined
from llmq.solvers.feedback import Feedback, solve_rows
from llmq.store import LayerReport
from llmq.tuning_blocks import tune_block

PROBE = 32  # tokens with which structure is observed and smoothing pairs are proven


@dataclass
class Solution:
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
class BlockJob:
    """A block that is to be solved.

    Attributes:
        block: dense, with its weights.
        name: of it.
        streams: per stream, the hidden states (B, T, D) of every batch that enter it.
        calls: per batch, the rest of its arguments.
        probe: those for a few tokens.
        recipe: what to do.
        lean: whether to keep nothing that can be computed again.
        outputs: per linear the second moment of the loss' gradient by its outputs, float32 (N, N),
            if its rows shall make good each other's errors.
        smoothed: whether channels are scaled already.
    """

    block: nn.Module
    name: str
    streams: Sequence[Sequence[Tensor]]
    calls: Sequence[Call]
    probe: Call
    recipe: Recipe
    lean: bool
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    smoothed: bool = False

    def solve(self, effort: Effort) -> Solution:
        """Solve every matrix; `block` only changes where channels are smoothed."""
        recipe, name = self.recipe, self.name
        view = as_linears(shared_copy(self.block))  # the block's own tensors
        hidden, *more = (effort.states(stream) for stream in self.streams)
        calls = effort.calls(self.calls, self.streams[0])
        work = run_copy(view, effort.device)  # what runs, and takes on quantized weights
        probe = (hidden[0][:1, :PROBE], self.probe.to(effort.device, hidden[0].dtype))
        schemes = {n: s for n in linears(view) if (s := recipe.scheme_for(f"{name}.{n}"))}
        if recipe.awq and not self.smoothed:
            recipe.awq.smooth(view, work, schemes, hidden, calls, probe)
            self.smoothed = True
        groups = shared_input_groups(work, *probe)
        twin = Twin(work, more[0], groups, probe) if more else None
        solution = Solution(effort, [work, twin.block] if twin else [work])
        done: set[str] = set()
        for group in groups:
            done.update(group)
            chosen = {n: schemes[n] for n in group if n in schemes}
            if not chosen:
                continue
            left = linears(view).keys() - done
            if twin and not self.lean and (left or group[0] in twin.sums):
                keep_outputs(twin.block, done, len(calls))
            problems = posed(work, list(chosen), hidden, calls, twin)
            _check(problems, f"{name}.{group[0]}")
            for linear, found, q in _solve_group(
                view, work, chosen, problems, recipe, self.outputs
            ):
                solution.solved[linear] = q
                solution.reports += [_sound(_named(report, name)) for report in found]
            if left and not self.lean:
                keep_outputs(work, done, len(calls))
        if recipe.block and twin:
            wanted = [run_block(twin.block, x, c) for x, c in zip(more[0], calls, strict=True)]
            solved = tune_block(view, solution.solved, hidden, calls, wanted, recipe.block)
            solution.solved, solution.runs[0] = solved, _with(view, solved, effort)
        return solution


def _check(problems: Sequence[Problem | Matching], name: str) -> None:
    """Refuse what is not finite.

    Raises:
        NonFiniteError: names the linear.
    """
    if not all(problem.finite() for problem in problems):
        raise NonFiniteError(
            f"{name}: its input is NaN or infinite, or too large to square. The model overflows in "
            "its dtype on this text; convert it to bfloat16 or float32."
        )


def _solve_group(
    view: nn.Module,
    work: nn.Module,
    schemes: dict[str, QuantScheme],
    problems: list[Problem] | list[Matching],
    recipe: Recipe,
    outputs: Mapping[str, Tensor],
) -> Iterator[tuple[str, list[LayerReport], list[QuantizedWeight]]]:
    """Solve linears that read the same tensor and give `work` their quantized weights.

    Every process of the run solves a part of them. `problems` is emptied on the way. Yields per
    linear its name, and one report and one result for each of its experts (one if it has none).
    """
    device, K = problems[0].device, _matrix(view, next(iter(schemes)), 0).shape[1]
    tokens = [problem.tokens for problem in problems]
    rows = {n: len(_matrix(view, n, 0)) for n in schemes}
    together = not outputs.keys().isdisjoint(schemes)
    shares = divide(rows, K, len(tokens), ranks.count(), whole=together)
    mine: dict[Piece, Solved] = {}
    for e in range(len(tokens)):
        own = [piece for piece in shares[ranks.number()] if piece.expert == e]
        mine |= _solve_pieces(view, own, schemes, problems, recipe, outputs)

    def blank(piece: Piece) -> QuantizedWeight:
        dtype = _matrix(view, piece.name, piece.expert).dtype
        return empty(schemes[piece.name], (piece.stop - piece.start, K), dtype, device)

    found = exchange(shares, mine, blank)
    for n in schemes:
        results, reports = [], []
        for e, count in enumerate(tokens):
            own = [piece for piece in found if (piece.name, piece.expert) == (n, e)]
            parts = [found[piece] for piece in sorted(own, key=lambda piece: piece.start)]
            q = joined([part.value for part in parts])
            _matrix(work, n, e).copy_(q.dequantize())
            label = _expert_name(n, e) if len(tokens) > 1 else n
            error = ratio(sum(part.lost for part in parts), sum(part.size for part in parts))
            seconds = sum(part.seconds for part in parts)
            reports.append(LayerReport(label, q.shape, schemes[n], error, count, seconds))
            results.append(q)
        yield n, reports, results


def _solve_pieces(
    view: nn.Module,
    pieces: Sequence[Piece],
    schemes: dict[str, QuantScheme],
    problems: list[Problem] | list[Matching],
    recipe: Recipe,
    outputs: Mapping[str, Tensor],
) -> dict[Piece, Solved]:
    """Solve rows of matrices, all for the first of `problems`, which is taken away.

    Those with one scheme are solved as one tall matrix: without feedback rows never interact.
    """
    problem, found = problems.pop(0), {}
    if not pieces:
        return found
    matrices = {p.name: _matrix(view, p.name, p.expert).to(problem.device) for p in pieces}
    H, extra, targets = problem.settled(matrices)
    del problem, matrices  # what targets are made of may be as large as what solving takes
    for scheme in dict.fromkeys(schemes[piece.name] for piece in pieces):
        own = [piece for piece in pieces if schemes[piece.name] == scheme]
        start = time.perf_counter()
        weights = [targets[p.name][p.start : p.stop] for p in own]
        targets = {n: W for n, W in targets.items() if schemes[n] != scheme}
        moments = [outputs[p.name].to(H.device) if p.name in outputs else None for p in own]
        how = recipe.feedback or Feedback(parts=1)
        with damped(H, extra):
            results = solve_rows(recipe.solver, weights, moments, H, scheme, how)
        seconds = (time.perf_counter() - start) / len(own)
        for piece, W, q in zip(own, weights, results, strict=True):
            found[piece] = Solved(q, *squares(W, q, H), seconds)
    return found


def _with(view: nn.Module, solved: dict[str, list[QuantizedWeight]], effort: Effort) -> nn.Module:
    """A copy of a block to run, with quantized weights."""
    work = run_copy(view, effort.device)
    for name, results in solved.items():
        for e, q in enumerate(results):
            _matrix(work, name, e).copy_(q.dequantize())
    return work


def _expert_name(stack: str, expert: int) -> str:
    parent, _, leaf = stack.rpartition(".")
    return f"{parent}.{expert}.{leaf}"


def relative_error(W: Tensor, q: QuantizedWeight, H: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = dequantized - W; 0 if the layer's output is 0."""
    return ratio(*squares(W, q, H))


def squares(W: Tensor, q: QuantizedWeight, H: Tensor) -> tuple[float, float]:
    """tr(D H D^T) and tr(W H W^T) with D = dequantized - W."""
    lost = size = 0.0
    for rows in q.slices():
        part = W[rows].float()
        delta = q.rows(rows).dequantize(torch.float32) - part
        size += float(quadratic(part, H).sum())
        lost += float(quadratic(delta, H).sum())
    return lost, size


def ratio(lost: float, size: float) -> float:
    """How much of a size was lost; 0 if there is none."""
    return lost / size if size > 0 else 0.0


def _matrix(block: nn.Module, name: str, expert: int) -> Tensor:
    weight = block.get_parameter(f"{name}.weight").data
    return weight[expert] if weight.ndim == 3 else weight


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
