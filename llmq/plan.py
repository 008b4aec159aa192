"""Before a run: what it will write, need and serve, from config.json and file headers alone.

No weight is read. Sizes come from the model built on the meta device and packed there, by the same
code that packs and names the real one, so they are exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmq import machine
from llmq.engines import Engine, engines
from llmq.errors import MemoryLimitError, OutputError, SchemeError
from llmq.hf.outline import outline, pack_outline, stored_bytes
from llmq.journal import Workplace
from llmq.nn import PackedEmbedding, packed_modules
from llmq.outlook import SURE, Outlook, advice, foresee, lacking, shape as shape_of
from llmq.progress import duration
from llmq.recipe import Recipe, check_experts, embedding_scheme, input_widths, quantizable
from llmq.report import size
from llmq.scheme import QuantScheme, undivided
from llmq.shards import DTYPES
from llmq.sizes import Job, Shape
from llmq.stored import Header

GROUPS = (128, 64, 32)
_LEAST = 64 << 20  # bytes that a disk needs besides what is written, for headers and logs


@dataclass(frozen=True)
class Problem:
    """Something that will not work, and what would.

    Attributes:
        where: layers, a number of GPUs, "memory", "GPU memory" or "disk".
        what: why it fails.
        fix: what to do instead.
        fatal: whether quantizing itself is impossible, rather than some use of the result.
    """

    where: str
    what: str
    fix: str
    fatal: bool


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        source: the model.
        parameters: weights of the model.
        matrices: how many will be quantized.
        quantized_weights: how many weights these hold.
        source_bytes: files of weights that are there.
        output_bytes: files of weights that will be written, index included; exact, unless bits
            are an average.
        bits_per_weight: of the quantized matrices, scales and zero points included.
        problems: what will not work.
        engines: who will load the result.
        outlook: memory, disk and time; None if it was not said how it shall be done.
    """

    source: str
    parameters: int
    matrices: int
    quantized_weights: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    problems: tuple[Problem, ...]
    engines: tuple[Engine, ...]
    outlook: Outlook | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    def line(self) -> str:
        """The most important of it in one line."""
        text = f"{self.source}: {size(self.source_bytes)} become {size(self.output_bytes)}"
        if self.outlook is None:
            return text
        found = self.outlook
        gpu = f", {size(found.gpu_bytes)} on the GPU" if found.gpu_bytes else ""
        time = f", {duration(found.seconds)} of time" if found.seconds is not None else ""
        memory, disk = size(found.memory_bytes), size(found.disk_bytes)
        return f"{text}; it takes about {memory} of memory{gpu}, {disk} of disk{time}"


def group_problems(shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> list[Problem]:
    """Layers that the group size does not divide.

    Args:
        shapes: matrix -> (N, K), as `quantize.quantizable` gives them.
        recipe: what shall be done.
    """
    problems = []
    for bad in undivided(input_widths(shapes), recipe.scheme_for):
        kinds = list(dict.fromkeys(_kind(name) for name in bad.names))
        advice = " or ".join(f"--group-size {g}" for g in bad.fits)
        skip = " ".join(f"--skip {kind.rpartition('.')[2]}" for kind in kinds)
        what = f"group size {bad.group_size} does not divide their {bad.in_features} inputs"
        problems.append(Problem(", ".join(kinds), what, f"{advice}, or {skip}", True))
    return problems


def parallel_problems(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, int]], recipe: Recipe, ranks: int
) -> list[Problem]:
    """What keeps `ranks` GPUs from sharing every layer (tensor parallelism).

    Which layers are cut along N ("colwise") and which along K ("rowwise") is what the model's own
    `base_model_tp_plan` says; a cut along K must fall between groups, and any cut between words.
    """
    if ranks == 1:
        return []
    plan: Mapping[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    where = f"{ranks} GPUs"
    if not plan:
        what = f"{model.config.model_type} has no tensor-parallel plan in transformers"
        return [Problem(where, what, "what the engine documents", False)]
    problems: dict[str, Problem] = {}
    for name, (N, K) in shapes.items():
        scheme, cut = recipe.scheme_for(name), _cut(plan, name)
        if scheme is None or cut is None:
            continue
        if reason := _cut_problem(scheme, N, K, cut, ranks):
            kind = _kind(name)
            problems.setdefault(kind, Problem(where, f"{kind}: {reason[0]}", reason[1], False))
    return list(problems.values())


def _cut_problem(
    scheme: QuantScheme, N: int, K: int, cut: str, ranks: int
) -> tuple[str, str] | None:
    """(what, fix) if a matrix (N, K) cannot be cut into `ranks` parts along N or K."""
    size = N if cut == "colwise" else K
    if size % ranks:
        return f"{size} does not divide by {ranks}", "fewer GPUs"
    part = size // ranks
    if cut == "rowwise" and scheme.group_size != -1 and part % scheme.group_size:
        fits = [g for g in GROUPS if part % g == 0]
        fix = f"--group-size {fits[0]}" if fits else "fewer GPUs, or --group-size -1"
        return f"each holds {part} inputs, no multiple of the group {scheme.group_size}", fix
    packed = cut == "rowwise" or not scheme.symmetric  # zero points are packed along N
    if packed and part * scheme.bits % 32:
        return f"{part} codes of {scheme.bits} bits do not fill whole words", "fewer GPUs"
    return None


def _cut(plan: Mapping[str, str], name: str) -> str | None:
    """ "colwise" or "rowwise" for the matrix `name`; None if every GPU holds all of it."""
    for pattern, style in plan.items():
        if re.search(re.escape(pattern).replace(r"\*", r"\d+") + "$", name):
            return next((cut for cut in ("colwise", "rowwise") if cut in style), None)
    return None


def disk_problems(out: str | os.PathLike[str], needed: int) -> list[Problem]:
    """Whether the disk of the folder `out` has `needed` bytes left.

    What an unfinished run into `out` has written counts as free: it will be used, or removed.
    """
    work = Workplace(out).folder
    files = work.rglob("*") if work.is_dir() else ()
    written = sum(path.stat().st_size for path in files if path.is_file())
    free = machine.free_disk(out) + written
    if free >= needed:
        return []
    what = f"{size(needed)} are needed, {size(free)} are free: {size(needed - free)} too few"
    return [Problem("disk", what, "another disk, or free some space", True)]


def memory_problems(shape: Shape, job: Job, device: str) -> list[Problem]:
    """Whether a run fits into the memory that is free now; fatal only where there is no doubt."""
    found = lacking(shape, job, device)
    if found is None:
        return []
    place, needed, free = found
    what = (
        f"about {size(needed)} more are needed, {size(free)} are free: {size(needed - free)} "
        "too few"
    )
    return [Problem(place, what, advice(shape, job, device), SURE * needed > free)]


def refuse(found: Plan) -> None:
    """Raise the first problem that makes a run impossible.

    Raises:
        MemoryLimitError, OutputError, SchemeError: with what would work.
    """
    errors = {"memory": MemoryLimitError, "GPU memory": MemoryLimitError, "disk": OutputError}
    for problem in found.problems:
        if problem.fatal:
            kind = errors.get(problem.where, SchemeError)
            raise kind(f"{problem.where}: {problem.what}. Use {problem.fix}.")


def _kind(name: str) -> str:
    """A layer's name without its number: "self_attn.q_proj"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def make(
    source: str,
    config: Any,
    headers: Mapping[str, Header],
    recipe: Recipe,
    *,
    ranks: Sequence[int] = (1,),
    out: str | os.PathLike[str] = ".",
    job: Job | None = None,
    device: str = "cpu",
    average: float | None = None,
    timed: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        source: name to show.
        config: configuration of the model, of transformers.
        headers: what the checkpoint's files hold, see `stored.tensor_headers`.
        recipe: what shall be done.
        ranks: numbers of GPUs that shall share the result by tensor parallelism.
        out: where it shall be written.
        job: how it shall be done, for memory and time; None = these are not asked for.
        device: where.
        average: bits that matrices have on average, if not those of the recipe.
        timed: measure the speed of the device, for the time.
    """
    dtype = model_dtype(config, headers)
    model = outline(config, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    check_experts(model, recipe)
    embeddings = embedding_scheme(model, recipe)
    shapes = quantizable(model, recipe.lm_head)
    problems = group_problems(shapes, recipe)
    problems += [p for n in ranks for p in parallel_problems(model, shapes, recipe, n)]
    serving = tuple(engines(model, shapes, recipe))
    known = shape_of(model, recipe, device) if job else None
    # A stack of experts is a parameter itself; a tied output layer shares one.
    tensors = dict(model.named_parameters(remove_duplicate=False))
    counts = {n: (tensors[n] if n in tensors else tensors[f"{n}.weight"]).numel() for n in shapes}
    chosen = {n: s for n in shapes if (s := recipe.scheme_for(n)) and s.divides(shapes[n][1])}
    weights = sum(counts[name] for name in chosen)
    tables = sum(tensors[f"{name}.weight"].numel() for name in embeddings)
    written, packed = _packed_bytes(model, chosen | embeddings, set(headers))
    if average is not None:  # every bit more or less is one of every weight
        change = int((average - recipe.scheme.bits) * weights / 8)
        written, packed = written + change, packed + change
    source_bytes = sum(header.nbytes for header in headers.values())
    outlook = None
    if job and known:
        outlook = foresee(known, job, written, device, dtype, timed)
        problems += memory_problems(known, job, device)
    needed = outlook.disk_bytes + _LEAST if outlook else written
    return Plan(
        source=source,
        parameters=parameters,
        matrices=len(chosen) + len(embeddings),
        quantized_weights=weights + tables,
        source_bytes=source_bytes,
        output_bytes=written,
        bits_per_weight=8 * packed / (weights + tables) if weights else 0.0,
        problems=(*problems, *disk_problems(out, needed)),
        engines=serving,
        outlook=outlook,
    )


def _packed_bytes(
    model: PreTrainedModel, schemes: Mapping[str, QuantScheme], known: set[str]
) -> tuple[int, int]:
    """Of all files, and of what is packed in them; `model` is packed."""
    pack_outline(model, schemes)
    modules: list[nn.Module] = [module for _, module in packed_modules(model)]
    modules += [module for module in model.modules() if isinstance(module, PackedEmbedding)]
    packed = sum(p.nbytes for m in modules for key, p in m.named_parameters() if "bias" not in key)
    return stored_bytes(model, known), packed


def model_dtype(config: Any, headers: Mapping[str, Header]) -> torch.dtype:
    """The dtype in which transformers loads a checkpoint: its config's, or the files' first."""
    if config.dtype is not None:
        return config.dtype
    floats = [DTYPES[h.dtype] for h in headers.values() if h.dtype in DTYPES]
    return next((dtype for dtype in floats if dtype.is_floating_point), torch.float32)
