"""What a run computes, from shapes alone; `machine.speeds` measures what a unit of it takes."""

from __future__ import annotations

from llmq.needs import JUDGED, TRIALS, tuning_piece
from llmq.scheme import wider_groups
from llmq.sizes import Group, Job, Shape

KINDS = ("model", "float32", "float64", "elements", "steps", "bytes")
SWEEPS = 5  # of coordinate descent
MOVES = 60  # calls of torch for the moves of one group in a sweep
BLOCK = 128  # columns that are rounded one by one, see `solvers.babai`
CANDIDATES = {True: 22, False: 43}  # grids of a search, with a symmetric scheme or zero points
REFITS = 3  # of a scale, see `solvers.grid`
NEAR = 8  # more scales that are tried, see `solvers.trials`
# Numbers that are visited per weight where many small things are done. These, and the constants in
# `_factor` and `_matching`, where small triangles are slower than products, were found by timing
# the parts on one CPU; `benchmarks/plan_grid.py` checks their sum.
COPIES = 265  # in another order, and grids that are prepared
BOOKS = 700  # k-means, and what is looked up; not timed
LOOKS = 100  # at the error of a layer: bytes to floats, differences
BROADCAST = 1.8  # times as slow as a plain operation are those of solvers, of two or three operands


def operations(shape: Shape, job: Job) -> dict[str, float]:
    """How much of each kind of work there is.

    "model": floating-point operations in the weights' dtype, "float32" and "float64": the same in
    these; "elements": numbers that elementwise operations visit; "steps": single calls of torch on
    little data; "bytes": of files that are read, checked or hashed.
    """
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    again = (2 if job.match else 1) if job.lean else 0  # what is not kept is computed again
    passes = (4 if job.match else 2) + (1 if job.awq else 0) + again
    for whole in shape.groups:
        _calibrating(total, whole, job, passes)
        g = whole.share(job.processes)
        if job.match and g.experts == 1:
            _matching(total, g)
        N, K, E = g.rows, g.columns, g.experts
        felt = g.felt(shape.hidden) if job.felt else 0
        _solving(total, g, job, job.parts if felt else 1, job.again if felt else 0)
        total["float32"] += 2 * felt * K if job.again else 0
        total["float32"] += 2.5 * E * N * K * K  # the error of the layer
        total["elements"] += (LOOKS + 40) * E * N * K  # and rounding for the gate, packing
        total["steps"] += 2000 + 200 * E
    pairs = job.tokens * job.window * shape.hidden * 4 * passes
    total["float32" if shape.eager else "model"] += pairs
    total["bytes"] = 6 * shape.block_bytes
    total = {kind: count * shape.blocks for kind, count in total.items()}
    total["model"] += 6 * JUDGED * shape.vocabulary * shape.hidden
    total["bytes"] += 6 * shape.rest_bytes
    if job.head:
        N, K = shape.vocabulary, shape.hidden
        total["float32"] += 1.25 * job.tokens * K * K + 2.5 * N * K * K
        _solving(total, Group(N, N, K), job)
    if job.tuning:
        _tuning(total, shape, job)
    if job.felt:
        _going_back(total, shape, job)
    if job.scan:
        weights = shape.blocks * sum(g.active * g.rows * g.columns for g in shape.groups)
        total["model"] += 6 * min(job.tokens, 32 * job.window) * weights
        tried = {g: 1 + len(wider_groups(job.group, g.columns)) for g in shape.groups}
        per_width = sum(tried[g] * g.weights * (g.columns + COPIES) for g in shape.groups)
        total["float32"] += 4 * shape.blocks * per_width
    return total


def _calibrating(total: dict[str, float], g: Group, job: Job, passes: int) -> None:
    """Text goes through the block; second moments, and what AWQ tries on them."""
    N, K, E = g.rows, g.columns, g.experts
    matched = job.match and E == 1
    tokens = job.tokens * (g.active if E > 1 else 1)
    total["model"] += 2 * N * K * (passes * tokens + 3 * JUDGED * g.active)
    total["elements"] += job.tokens * passes * (N + 2 * K) * g.active * 4
    total["float32"] += tokens * K * 1.25 * K
    if matched:
        total["float32"] += 2 * tokens * K * (2 * N if g.behind else K)
    if job.awq:
        total["float32"] += 11 * 2 * E * N * K * K + tokens * 1.25 * K * K
        total["elements"] += 11 * 25 * E * N * K


def _matching(total: dict[str, float], g: Group) -> None:
    """Two factors; per matrix one shift that is judged and one that is taken."""
    N, K = g.rows, g.columns
    total["float64"] += 2 * _factor(K) + 2 * 2 * N * K * (K + 1400)
    total["float32"] += (2.5 if g.behind else 10.5) * N * K * K
    total["elements"] += LOOKS * N * K


def _factor(K: int) -> float:
    """One factor of a second moment."""
    return K**3 / 3 + 900 * K**2


def _going_back(total: dict[str, float], shape: Shape, job: Job) -> None:
    """Through every block twice and back once, and with logits; moments and their factors."""
    weights = shape.blocks * sum(g.active * g.rows * g.columns for g in shape.groups)
    total["model"] += 6 * job.felt * weights
    total["model"] += 4 * job.felt * shape.vocabulary * shape.hidden
    total["elements"] += 10 * job.felt * shape.vocabulary
    squares = shape.blocks * sum(g.felt(shape.hidden) for g in shape.groups)
    total["float32"] += 1.25 * job.felt * squares + shape.hidden * squares
    total["float64"] += shape.hidden / 3 * squares


def _solving(total: dict[str, float], g: Group, job: Job, parts: int = 1, again: int = 0) -> None:
    """What the solver does, a part of the rows after the other, and so many sweeps after it."""
    N, K, E = g.rows, g.columns, g.experts
    weights, width = E * N * K, K if job.group == -1 else job.group
    search = COPIES + 7 * CANDIDATES[job.symmetric] + 16 * REFITS  # visits per weight
    if job.kind == "grid":  # errors are measured with the groups' blocks of H
        tried = CANDIDATES[job.symmetric] + 2 * REFITS
        total["float32"] += 2 * tried * weights * width
        total["elements"] += BROADCAST * weights * (search + 10 * tried)
    if job.kind not in ("gptq", "polished", "book"):
        return
    inside = min(width, BLOCK)
    product = weights * K * (1 + 16 / inside)  # a few rows at once are slower
    total["float64"] += E * _factor(K)
    total["float32"] += product + weights * inside
    if job.kind == "book":
        total["elements"] += BROADCAST * weights * BOOKS
        total["steps"] += 20 * E * K
        return
    visits = search + 10 + inside / 2
    total["steps"] += 10 * E * K * parts
    if job.trials:
        grids = 2 * job.trials + NEAR
        visits += 9 * REFITS * job.trials + grids * (10 + inside / 2)
        pieces = max(parts, -(-2 * job.trials * width * N // TRIALS))
        total["steps"] += 20 * E * K * pieces
    if job.kind == "polished":
        sweeps, descents = SWEEPS + again, 2 if again else 1
        visits += sweeps * (110 + inside / 2)
        total["float32"] += sweeps * 2 * product
        total["steps"] += sweeps * MOVES * E * K / inside * parts
        total["float64"] += descents * 2.5 * weights * K  # which rows became better
        total["elements"] += descents * 2 * LOOKS * weights
    total["elements"] += BROADCAST * weights * visits


def _tuning(total: dict[str, float], shape: Shape, job: Job) -> None:
    """Forward, backward, both logits, and looks at a sixth of the text."""
    weights = shape.blocks * sum(g.active * g.rows * g.columns for g in shape.groups)
    tokens = job.tuning * max(job.window, job.step)
    total["float32"] += tokens * (6 * weights + 8 * shape.vocabulary * shape.hidden)
    total["float32"] += (
        job.looks / 6 * job.tokens * (2 * weights + 4 * shape.vocabulary * shape.hidden)
    )
    total["elements"] += tokens / tuning_piece(shape, job) * 8 * weights
    total["elements"] += tokens * shape.vocabulary * 12
