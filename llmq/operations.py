"""What a run computes, from shapes alone; `machine.speeds` measures what a unit of it takes."""

from __future__ import annotations

from llmq.needs import JUDGED, tuning_piece
from llmq.sizes import Job, Shape

SWEEPS = 5  # of coordinate descent


def operations(shape: Shape, job: Job) -> dict[str, float]:
    """How much of each kind of work there is.

    "model": floating-point operations in the weights' dtype, "float32" and "float64": the same in
    these; "elements": numbers that elementwise operations visit; "steps": single calls of torch on
    little data; "bytes": of files that are read, checked or hashed.
    """
    total = dict.fromkeys(("model", "float32", "float64", "elements", "steps", "bytes"), 0.0)
    passes = (5 if job.match else 2) + (1 if job.awq else 0) + (1 if job.lean else 0)
    sweeps = SWEEPS if job.kind == "polished" else 0
    for g in shape.groups:
        N, K, E = g.rows, g.columns, g.experts
        matched = job.match and E == 1
        tokens = job.tokens * (g.active if E > 1 else 1)
        total["model"] += 2 * N * K * (passes * tokens + 3 * JUDGED * g.active)
        total["elements"] += job.tokens * passes * (N + 2 * K) * g.active * 4
        total["float32"] += tokens * K * (1.25 * K + (2 * K if matched else 0))
        if matched and N == g.widest:
            total["float32"] += 2 * tokens * N * K
        total["float32"] += 2.5 * E * N * K * K  # the error of the layer
        total["elements"] += 40 * E * N * K  # rounding for the gate, packing, comparing
        if matched:
            total["float64"] += K**3 / 3 + 2 * N * K * K
            total["float32"] += 4 * N * K * K
        if job.kind in ("gptq", "polished"):
            total["float64"] += E * K**3
            total["float32"] += E * N * K * K * (1 + 2 * sweeps)
            total["float64"] += 2.5 * E * N * K * K if sweeps else 0
            tried = 250 if sweeps else 0  # grids, in the ladder's recipes
            total["elements"] += E * N * K * (270 + tried + 75 * sweeps)
            total["steps"] += E * K * (10 + 7 * sweeps)
        elif job.kind == "grid":
            total["elements"] += 300 * E * N * K
        if job.awq:
            total["float32"] += 11 * 2 * E * N * K * K + tokens * 1.25 * K * K
            total["elements"] += 11 * 25 * E * N * K
        total["steps"] += 2000 + 200 * E
    pairs = job.tokens * job.window * shape.hidden * 4 * passes
    total["float32" if shape.eager else "model"] += pairs
    total["bytes"] = 6 * shape.block_bytes
    total = {kind: count * shape.blocks for kind, count in total.items()}
    total["model"] += 6 * JUDGED * shape.vocabulary * shape.hidden
    total["bytes"] += 6 * shape.rest_bytes
    if job.head:
        N, K = shape.vocabulary, shape.hidden
        total["float32"] += 1.25 * job.tokens * K * K + N * K * K * (3.5 + 2 * sweeps)
        total["elements"] += N * K * (310 + (250 if sweeps else 0) + 75 * sweeps)
    if job.tuning:
        weights = shape.blocks * sum(g.active * g.rows * g.columns for g in shape.groups)
        tokens = job.tuning * job.batch
        # Forward, backward, both logits, and about eight looks at a sixth of the text.
        total["float32"] += tokens * (6 * weights + 8 * shape.vocabulary * shape.hidden)
        total["float32"] += 8 / 6 * job.tokens * (2 * weights + 4 * shape.vocabulary * shape.hidden)
        total["elements"] += tokens / tuning_piece(shape, job) * 8 * weights
        total["elements"] += tokens * shape.vocabulary * 12
    if job.scan:
        weights = shape.blocks * sum(g.active * g.rows * g.columns for g in shape.groups)
        total["model"] += 6 * min(job.tokens, 32 * job.window) * weights
        per_width = sum(g.weights * (g.columns + 270) for g in shape.groups)
        total["float32"] += 4 * shape.blocks * per_width
    return total
