"""What memory a run will take, from shapes alone.

`memory` follows the run from phase to phase and adds up what the flow, the solvers and the gate
hold at once in each; the largest sum is the peak. K, N are inputs and outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmq.factor import PANEL, ROWS
from llmq.sizes import Group, Job, Phase, Shape

JUDGED = 256  # tokens that the gate carries along
SLICE = 1 << 22  # weights whose errors are summed at once, see `scheme.QuantizedWeight.slices`
TRIALS = 1 << 20  # weights times candidates that a grid search tries at once
CHUNK = 1 << 24  # bytes of a file that are checked at once
DRAWN = 1 << 23  # logits from which labels are drawn at once, see `curvature`
LOGITS = 1 << 25  # of one piece of a batch while scales are tuned, see `tuning`


def memory(shape: Shape, job: Job) -> list[Phase]:
    """The phases of a run."""
    phases = [Phase("checking the source", host={"pieces of files": 3 * CHUNK})]
    if job.scan:
        phases.append(_scanning(shape, job))
    if job.felt:
        phases += _going_back(shape, job)
    phases += _on_blocks(shape, job)
    phases += _ending(shape, job)
    if job.head:
        phases.append(_solving_head(shape, job))
    if job.tuning:
        phases.append(_tuning(shape, job))
    return phases


def _felt(shape: Shape) -> int:
    """Bytes of the output moments of a block."""
    return 4 * sum(group.felt(shape.hidden) for group in shape.groups)


def aside(shape: Shape, job: Job) -> int:
    """Bytes of files that `curvature` puts aside: states on the way there, moments on that back."""
    if not job.felt:
        return 0
    return shape.blocks * max(job.felt * shape.hidden * shape.running, _felt(shape))


def _going_back(shape: Shape, job: Job) -> Iterator[Phase]:
    """Some windows go through the model and back, one at a time; in between there are logits."""
    streams = {"states and gradients": 3 * job.felt * shape.hidden * shape.running}
    inside = sum(g.active * (2 * g.rows + g.columns) for g in shape.groups) + 6 * shape.hidden
    pairs = shape.heads * job.window**2 * (shape.running + 4) if shape.eager else 0
    logits = (4 * 4 + 2 * shape.running) * min(DRAWN, job.window * shape.vocabulary)
    outside = {"embeddings and output layer": shape.rest_bytes}
    device = {**streams, "logits": logits, "copies": _copied(shape, shape.running)}
    yield Phase("drawing labels", device, {}, outside)
    back = {
        "a copy of the block": shape.run(shape.block_bytes),
        "activations": 2 * job.window * shape.running * inside + 2 * pairs,
        "output moments": 2 * _felt(shape),
    }
    yield Phase("going back", {**streams, **back}, {}, {"source of the block": shape.block_bytes})


def _on_blocks(shape: Shape, job: Job) -> list[Phase]:
    """What is done with every block."""
    phases = [*_smoothing(shape, job)] if job.awq else []
    for i in range(len(shape.groups)):
        phases += _solving(shape, job, i)
    phases += [_judging(shape, job), _writing(shape, job)]
    if not job.ahead:
        return phases
    both = {"this block and the next": 2 * shape.block_bytes}  # in pinned memory
    return [replace(phase, host={**phase.host, **both}) for phase in phases]


def states(shape: Shape, job: Job) -> int:
    """Bytes of the hidden states of one stream."""
    return job.tokens * shape.hidden * shape.running


def _carried(shape: Shape, job: Job) -> dict[str, int]:
    """What is there all the time while blocks are worked on."""
    streams = 2 if job.match else 1
    kept = 0 if job.lean else streams * states(shape, job)
    return {"hidden states": kept}


def _block(shape: Shape, job: Job) -> dict[str, int]:
    """The copies of a block that run; finished parts keep their outputs for all tokens.

    In full precision all of its parts do, of which there may be two.
    """
    copies = 2 if job.match else 1
    kept = 0 if job.lean else (3 if job.match else 1) * states(shape, job)
    block = copies * shape.run(shape.block_bytes)
    return {"copies of the block": block, "outputs of its parts": kept}


def _running(shape: Shape, job: Job) -> int:
    """What a batch takes inside of a block: the widest tensors of its MLP, and attention."""
    widest = max(g.active * (2 * g.rows + g.columns) for g in shape.groups)
    inside = job.batch * shape.running * (widest + 4 * shape.hidden)
    pairs = shape.heads * job.batch * job.window * (shape.running + 4) if shape.eager else 0
    return inside + pairs


def _solving(shape: Shape, job: Job, index: int) -> Iterator[Phase]:
    """Collect the moments of a group, then solve it; two phases, or three if it is matched."""
    g = shape.groups[index]
    square, matrix = 4 * g.columns**2, g.rows * g.columns
    matched = job.match and g.experts == 1
    codes = sum(group.weights for group in shape.groups[: index + 1])
    fixed = {**_carried(shape, job), **_block(shape, job), "codes": codes}
    if job.felt:
        fixed["output moments"] = _felt(shape)
    source = {"source of the block": shape.block_bytes}
    sums = g.experts * square + (square if g.experts > 1 else 0)
    rows = 4 * job.batch * g.columns * (3 if matched else 1)
    if matched:  # both for fitting and judging: x~ x~^T, and what is missing
        sums = 2 * square + 2 * (4 * matrix if g.behind else square)
        rows += 4 * matrix if g.behind and shape.itemsize < 4 else 0
    work = {"second moments": sums, "a batch": _running(shape, job) + rows}
    yield Phase("calibrating", {**fixed, **work}, {}, source)
    if matched:
        targets, largest = matrix * shape.itemsize, g.widest * g.columns
        # H while it is factored; or a shift in float32 and float64, and what it was made of.
        work = square + max(_panels(g.columns), 16 * largest)
        yield Phase(
            "matching",
            {**fixed, "second moments": sums, "factor": work, "targets": targets},
            {},
            source,
        )
        held = square
    else:
        held = g.experts * square
    tall = shape.itemsize * matrix
    # Afterwards: a slice of values and errors in float32; or one matrix of codes becomes weights.
    after = tall + matrix + max(24 * min(SLICE, matrix), _values(g, shape.itemsize))
    solving = solver(g.share(job.processes), job, shape.itemsize)
    if job.felt and (felt := 4 * g.felt(shape.hidden)):  # moments, factors, what parts have lost
        solving += 2 * felt + 4 * matrix
    work = {"second moments": held, "solver": max(solving, after)}
    yield Phase("solving", {**fixed, **work}, {}, source)


def solver(g: Group, job: Job, itemsize: int) -> int:
    """Bytes that a solver holds at its fullest moment, its weights included, H not."""
    square, matrix = 4 * g.columns**2, g.rows * g.columns
    tall = itemsize * matrix
    if job.kind in ("rtn", "grid"):
        return tall + matrix + 24 * TRIALS
    inside = g.rows * (128 if job.group == -1 else job.group)  # weights that are rounded in a row
    search = 8 * inside + 5 * 4 * TRIALS
    # The factor while it is made; then that, columns and codes.
    making = square + _panels(g.columns) + tall
    if job.kind == "book":  # codes before and after, outliers, and in the end what was lost
        return max(making, square + tall + 12 * matrix)
    pass_over = max(making, square + tall + 5 * matrix + max(search, 2 * matrix))
    if job.kind == "gptq":
        return pass_over
    descent = tall + matrix + 16 * matrix  # weights, codes, values and errors in float32
    errors = square // 2 + tall + 2 * matrix + 5 * 8 * min(SLICE, matrix)
    return max(pass_over, descent, errors)


def _panels(K: int) -> int:
    """What a factor's panels take in float64 while it is made."""
    return 8 * K * (min(K, PANEL) + min(K, ROWS))


def _values(g: Group, itemsize: int) -> int:
    """What the weights of the largest matrix take while they are made of its codes."""
    return (2 + 2 * itemsize) * g.widest * g.columns


def _smoothing(shape: Shape, job: Job) -> Iterator[Phase]:
    """Pairs are proven on a copy in float32; then factors are tried on another one."""
    fixed = {**_carried(shape, job), **_block(shape, job)}
    source = {"source of the block": shape.block_bytes}
    largest = max(g.rows * g.columns for g in shape.groups)
    widest = max(g.widest * g.columns for g in shape.groups)
    exact = {
        "exact copy": 4 * shape.block_bytes // shape.itemsize,
        "matrices of a pair": 4 * largest + 8 * widest,
    }
    yield Phase("proving pairs", {**fixed, **exact}, {}, source)
    trials = {
        "a trial copy": shape.run(shape.block_bytes),
        "second moments": sum(4 * g.columns**2 for g in shape.groups),
        "a matrix": 19 * widest,
        "a batch": _running(shape, job),
    }
    yield Phase("smoothing", {**fixed, **trials}, {}, source)


def _judging(shape: Shape, job: Job) -> Phase:
    """The gate runs the original, the rounded and the solved block, one after the other."""
    largest = max(g.widest * g.columns + _values(g, shape.itemsize) for g in shape.groups)
    codes = sum(g.weights for g in shape.groups)
    device = {
        **_carried(shape, job),
        "codes": codes,
        "copies of the block": shape.run(shape.block_bytes),
        "a rounded matrix": largest,
    }
    return Phase("judging", device, {}, {"source of the block": 2 * shape.block_bytes})


def _writing(shape: Shape, job: Job) -> Phase:
    """Codes, what they are packed into, and stacks of them for the comparison with the file."""
    codes = sum(g.weights for g in shape.groups)
    stacks = sum(g.weights for g in shape.groups if g.experts > 1)
    host = {"packed weights": codes, "stacks": stacks, "a matrix": 4 * CHUNK}
    device = {**_carried(shape, job), "codes": codes}
    return Phase("writing", device, host, {"source of the block": shape.block_bytes})


def _head_bytes(shape: Shape) -> int:
    return shape.itemsize * shape.vocabulary * shape.hidden


def _copied(shape: Shape, itemsize: int) -> int:
    """Bytes of a copy of everything outside the blocks, if it runs in a dtype of another size."""
    return 0 if itemsize == shape.itemsize else shape.rest_bytes * itemsize // shape.itemsize


def _ending(shape: Shape, job: Job) -> Iterator[Phase]:
    """Logits of three streams are compared, then the rest of the model is written."""
    codes = shape.vocabulary * shape.hidden if job.embeddings else 0
    logits = JUDGED * shape.vocabulary
    compared = 3 * shape.judging * logits + 5 * 4 * logits // 8
    host = {"logits": compared, "copies": _copied(shape, shape.judging)}
    yield Phase("comparing logits", {}, host, {"output layer": _head_bytes(shape)})
    host = {"pieces": 3 * CHUNK, "codes of the embeddings": codes}
    yield Phase("ending", {}, host, {"embeddings and more": shape.rest_bytes})


def _solving_head(shape: Shape, job: Job) -> Phase:
    """It is solved where it is, packed, and packed again for this machine."""
    head = Group(shape.vocabulary, shape.vocabulary, shape.hidden)
    matrix = shape.vocabulary * shape.hidden
    after = shape.itemsize * matrix + 2 * matrix + 24 * min(SLICE, matrix)
    work = {
        "second moments": 4 * shape.hidden**2,
        "solver": max(solver(head, job, shape.itemsize), after),
    }
    rest = {"embeddings and more": max(0, shape.rest_bytes - _head_bytes(shape))}
    return Phase("output layer", {**_carried(shape, job), **work}, {}, rest)


def _scanning(shape: Shape, job: Job) -> Phase:
    """The whole model, a second moment of every matrix, activations for the way back."""
    moments = sum(4 * g.matrices * g.columns**2 for g in shape.groups) * shape.blocks
    inside = sum(g.active * (2 * g.rows + g.columns) for g in shape.groups) + 6 * shape.hidden
    kept = 1024 * shape.running * inside * shape.blocks
    logits = 1024 * shape.vocabulary * (3 * 4 + shape.running)
    model = shape.run(shape.blocks * shape.block_bytes + shape.rest_bytes)
    device = {"model": model, "second moments": moments, "activations": kept, "logits": logits}
    if job.felt:
        felt = sum(g.felt(shape.hidden) for g in shape.groups)
        device["output moments"] = 4 * felt * shape.blocks
    return Phase("scanning", device)


def tuning_piece(shape: Shape, job: Job) -> int:
    """Tokens that go through the whole model and back at once while scales are tuned."""
    return max(job.window, min(job.step, LOGITS // shape.vocabulary))


def _tuning(shape: Shape, job: Job) -> Phase:
    """The packed model with its codes, activations of a piece in float32, the way back."""
    weights = sum(g.weights for g in shape.groups) * shape.blocks
    inside = sum(g.active * (2 * g.rows + g.columns) for g in shape.groups) + 6 * shape.hidden
    piece = tuning_piece(shape, job)
    judged = max(job.window, min(job.batch, LOGITS // shape.vocabulary))
    device = {
        **_carried(shape, job),
        "packed weights and codes": 2 * weights,
        "scales and their moments": weights // 2,
        "embeddings and output layer": 3 * 4 * shape.rest_bytes // shape.itemsize,
        "activations": 4 * piece * inside * shape.blocks,
        "logits": 4 * max(8 * piece, 6 * judged) * shape.vocabulary,
        "a matrix": 4 * 4 * max(g.widest * g.columns for g in shape.groups),
    }
    return Phase("tuning scales", device)
