"""Memory, disk and time of a run on this machine, from a model on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmq import machine
from llmq.adapters import as_linears, run_dtype, shared_copy
from llmq.blocks import decoder_blocks, linears
from llmq.curvature import spacing
from llmq.needs import aside, memory, states
from llmq.objective import HELD_OUT
from llmq.operations import operations
from llmq.recipe import Recipe
from llmq.sizes import Group, Job, Phase, Shape
from llmq.solvers.books import Codebook
from llmq.solvers.descent import Polished
from llmq.solvers.feedback import Feedback
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.solvers.superblocks import OnSuperBlocks

BATCH_TOKENS = 2048  # that go through a block at once
LATER = 40 << 20  # bytes of libraries and work space that a run still loads after planning
UNUSED = 96 << 20  # bytes that the C library keeps at most of what was given back to it
START = 8.0  # seconds for libraries, tokenizer, shapes and the checks of source and result
SURE = 0.85  # of an estimate: with less than this there is no doubt


@dataclass(frozen=True)
class Outlook:
    """What a run takes on this machine; estimates.

    Attributes:
        memory_bytes: peak of this process, mapped pages of files included.
        needed_bytes: the same without those, which the system takes back when it needs room.
        gpu_bytes: peak of tensors on the GPU; 0 without one.
        phase: of the run in which the peak of `needed_bytes` lies.
        disk_bytes: at most, while it runs: finished blocks, the result, hidden states.
        seconds: of wall time; None if this machine's speed was not measured.
    """

    memory_bytes: int
    needed_bytes: int
    gpu_bytes: int
    phase: str
    disk_bytes: int
    seconds: float | None


def batch_windows(windows: int, window: int) -> int:
    """How many windows of `window` tokens go through a block at once, of `windows` in all."""
    return max(1, min(BATCH_TOKENS // window, windows // HELD_OUT))


def job(
    recipe: Recipe,
    windows: int,
    window: int,
    lean: bool,
    scan: bool,
    device: str = "cpu",
    processes: int = 1,
) -> Job:
    """What a recipe asks of each process; see `Job`.

    Args:
        recipe: what shall be done.
        windows: of calibration text, in each process.
        window: tokens of one.
        lean, scan, processes: see `Job`.
        device: where.
    """
    solver, feedback = recipe.solver, recipe.feedback or Feedback(parts=1, rounds=0)
    if isinstance(solver, OnSuperBlocks):  # which takes a little more
        solver = solver.plain
    tuning = recipe.scales
    polished = isinstance(solver, Polished)
    inner = solver.start if polished else solver
    rounding = "grid" if isinstance(inner, RTN) and inner.search else "rtn"
    kind = "polished" if polished else "gptq" if isinstance(inner, GPTQ) else rounding
    if isinstance(solver, Codebook):
        kind = "book" if solver.feedback else "grid"
    return Job(
        tokens=windows * window,
        window=window,
        batch=batch_windows(windows, window) * window,
        kind=kind,
        match=recipe.match,
        felt=_felt(recipe, windows, window, processes),
        parts=feedback.parts,
        again=feedback.rounds * feedback.sweeps,
        awq=recipe.awq is not None,
        lean=lean,
        scan=scan,
        head=recipe.lm_head,
        embeddings=recipe.embeddings is not None,
        tuning=tuning.steps if tuning else 0,
        step=tuning.tokens if tuning else 0,
        looks=1 + -(-tuning.steps // tuning.every) if tuning else 0,
        ahead=device != "cpu",
        group=recipe.scheme.group_size,
        symmetric=recipe.scheme.symmetric,
        trials=inner.trials if isinstance(inner, GPTQ) and recipe.scheme.group_size != -1 else 0,
        processes=processes,
    )


def _felt(recipe: Recipe, windows: int, window: int, processes: int) -> int:
    """Tokens of this process on which `curvature` measures what the loss feels."""
    if recipe.feedback is None:
        return 0
    every = spacing(processes * windows * window, recipe.feedback.tokens)
    return -(-windows // every) * window


def shape(model: Any, recipe: Recipe, device: str = "cpu") -> Shape:
    """What of a model of transformers (on meta) matters for memory and time on a device."""
    prefix, blocks = decoder_blocks(model)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    number = sizes.index(max(sizes))
    config = model.config.get_text_config()
    everything = sum(p.nbytes for p in model.parameters())
    return Shape(
        blocks=len(blocks),
        block_bytes=sizes[number],
        rest_bytes=everything - sum(sizes),
        groups=tuple(_groups(blocks[number], f"{prefix}.{number}", recipe, config)),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=model.dtype.itemsize,
        running=run_dtype(model.dtype, torch.device(device)).itemsize,
        judging=run_dtype(model.dtype, torch.device("cpu")).itemsize,
        heads=config.num_attention_heads,
        eager=config._attn_implementation == "eager",
    )


def _groups(block: nn.Module, name: str, recipe: Recipe, config: Any) -> list[Group]:
    """Neighbours in one module with inputs of one width; what a run observes may differ a little.

    The last matrix of a module that gives back hidden states reads something of its own.
    """
    active = getattr(config, "num_experts_per_tok", None) or 2
    view = as_linears(shared_copy(block))
    found: dict[tuple[str, int, int, bool], list[int]] = {}
    names = [n for n in linears(view) if recipe.scheme_for(f"{name}.{n}")]
    for i, linear in enumerate(names):
        weight = view.get_parameter(f"{linear}.weight")
        parent = linear.rpartition(".")[0]
        N, K = weight.shape[-2:]
        experts = len(weight) if weight.ndim == 3 else 1
        last = i + 1 == len(names) or names[i + 1].rpartition(".")[0] != parent
        alone = last and N == config.hidden_size
        found.setdefault((parent, K, experts, alone), []).append(N)
    return [
        Group(sum(rows), max(rows), K, experts, min(active, experts), len(rows))
        for (_, K, experts, _), rows in found.items()
    ]


def foresee(
    shape: Shape,
    job: Job,
    output_bytes: int,
    device: str,
    dtype: torch.dtype,
    timed: bool,
) -> Outlook:
    """Memory, disk and time of a run, from what this process holds now and this machine's speed.

    That is measured only if it shall be `timed`.
    """
    worst, most = _peaks(shape, job, device)
    base = machine.resident_bytes() + LATER
    kept = (2 if job.match else 1) * states(shape, job)
    seconds = None
    if timed:
        speeds = machine.speeds(device, run_dtype(dtype, torch.device(device)))
        counts = operations(shape, job)
        seconds = START + sum(counts[kind] * speeds[kind] for kind in counts)
    return Outlook(
        memory_bytes=base + most,
        needed_bytes=base + _taken(worst, device),
        gpu_bytes=0 if device == "cpu" else max(p.on_device for p in memory(shape, job)),
        phase=worst.name,
        disk_bytes=2 * output_bytes + 2 * kept + aside(shape, job),
        seconds=seconds,
    )


def _taken(phase: Phase, device: str) -> int:
    """Bytes of the CPU's memory, with those that are free but not given back to the system."""
    used = phase.on_host + (phase.on_device if device == "cpu" else 0)
    return used + min(used // 2, UNUSED)


def _peaks(shape: Shape, job: Job, device: str) -> tuple[Phase, int]:
    """The phase that takes most of its own, and the most that any takes with mapped files."""
    phases = memory(shape, job)
    worst = max(phases, key=lambda phase: _taken(phase, device))
    return worst, max(_taken(phase, device) + phase.of_files for phase in phases)


def lacking(shape: Shape, job: Job, device: str) -> tuple[str, int, int] | None:
    """Where a run needs more than there is: "memory" or "GPU memory", needed and free bytes.

    None if it fits, or if the system does not say what is free.
    """
    phases = memory(shape, job)
    places = {"memory": ("cpu", LATER + max(_taken(phase, device) for phase in phases))}
    if device != "cpu":
        places["GPU memory"] = (device, max(phase.on_device for phase in phases))
    for place, (where, needed) in places.items():
        free = machine.free_memory(where)
        if free is not None and needed > free:
            return place, needed, free
    return None


def advice(shape: Shape, job: Job, device: str) -> str:
    """Options, one after the other, until the run fits."""
    windows = job.tokens // job.window
    fewer = max(16, windows // 4)
    steps: Sequence[tuple[str, dict[str, Any]]] = (
        ("--tune-scales 0", {"tuning": 0}),
        ("--activations disk", {"lean": True}),
        ("--quality fast", {"match": False}),
        (f"--samples {fewer}", {"tokens": min(fewer, windows) * job.window}),
        ("--method gptq", {"kind": "gptq"}),
        ("--method rtn", {"kind": "rtn", "awq": False}),
    )
    used = []
    for option, change in steps:
        changed = replace(job, **change)
        if changed == job or (option == "--method gptq" and job.kind != "polished"):
            continue
        job = changed
        if option.startswith(("--quality", "--method")):  # which tunes nothing
            used = [o for o in used if not o.startswith(("--quality", "--method", "--tune"))]
        used.append(option)
        if lacking(shape, job, device) is None:
            return " ".join(used)
    return "a machine with more memory"
