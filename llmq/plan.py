"""Before a run: what it will write, need and serve, from config.json and file headers alone.

No weight is read. Sizes come from the model built on the meta device and packed there, by the same
code that packs and names the real one, so they are exact.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmq.hf.outline import outline, pack_outline, stored_bytes
from llmq.nn import STACKS, packed_modules
from llmq.quantize import Recipe, check_experts, quantizable
from llmq.scheme import QuantScheme
from llmq.shards import DTYPES
from llmq.stored import Header

GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Problem:
    """Something that will not work, and what would.

    Attributes:
        where: a layer, a number of GPUs, a disk.
        what: why it fails.
        fix: what to do instead.
        fatal: whether quantizing itself is impossible, rather than some use of the result.
    """

    where: str
    what: str
    fix: str
    fatal: bool


@dataclass(frozen=True)
class Engine:
    """Whether an inference engine loads the result.

    Attributes:
        name: the engine.
        loads: True, False, or None where nobody has tried.
        note: limits, or why not.
    """

    name: str
    loads: bool | None
    note: str


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        source: the model.
        parameters: weights of the model.
        matrices: how many will be quantized.
        quantized_weights: how many weights these hold.
        source_bytes: files of weights that are there.
        output_bytes: files of weights that will be written, index included; exact.
        bits_per_weight: of the quantized matrices, scales and zero points included.
        problems: what will not work.
        engines: who will load the result.
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

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


def group_problems(shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> list[Problem]:
    """Layers that the group size does not divide.

    Args:
        shapes: matrix -> (N, K), as `quantize.quantizable` gives them.
        recipe: what shall be done.
    """
    bad = {
        name: K
        for name, (_, K) in shapes.items()
        if (scheme := recipe.scheme_for(name)) and not scheme.divides(K)
    }
    problems = []
    for K in sorted(set(bad.values())):
        kinds = list(dict.fromkeys(_kind(name) for name in bad if bad[name] == K))
        advice = " or ".join(f"--group-size {g}" for g in [*(g for g in GROUPS if K % g == 0), -1])
        skip = " ".join(f"--skip {kind.rpartition('.')[2]}" for kind in kinds)
        what = f"group size {recipe.scheme.group_size} does not divide their {K} inputs"
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


def engines(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, int]], recipe: Recipe
) -> list[Engine]:
    """Who loads the result. FORMATS are compressed-tensors `pack-quantized` in every case."""
    schemes = {s for name in shapes if (s := recipe.scheme_for(name))}
    symmetric = all(s.symmetric for s in schemes)
    widths = sorted({s.bits for s in schemes})
    common = all(bits in (4, 8) for bits in widths)
    modules = dict(model.named_modules())
    odd = sorted({type(m).__name__ for n in shapes if (m := modules.get(n)) and not _plain(m)})
    experts = any(name.rpartition(".")[2] in STACKS and name not in modules for name in shapes)
    stock = Engine("stock transformers", True, "with compressed-tensors; weights become dense")
    if not symmetric:
        stock = Engine(stock.name, False, "it refuses zero points: use --symmetric")
    elif odd:
        stock = Engine(stock.name, False, f"it does not know {', '.join(odd)} as linear layers")
    text = f"{' and '.join(map(str, widths))} bits"
    vllm = Engine("vLLM", True, "per GPU: N a multiple of 64, K of 128")
    small = sorted({K for n, (_, K) in shapes.items() if recipe.scheme_for(n) and K % 128})
    if small:  # its fast kernel, Marlin, refuses; others may take it
        vllm = Engine("vLLM", None, f"on GPUs not tried where K={small[0]} is no multiple of 128")
    sglang = Engine("SGLang", True, "from its source, not run")
    if not common:
        vllm = Engine("vLLM", None, f"{text}: not tried; 4 and 8 bits are known to load")
        sglang = Engine("SGLang", False, f"{text}: it reads 4 and 8 bits only")
    elif experts and not symmetric:
        sglang = Engine("SGLang", None, "mixtures with zero points: doubtful; use --symmetric")
    return [
        Engine("llmq (transformers with llmq)", True, "weights stay packed"),
        stock,
        vllm,
        sglang,
    ]


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def disk_problems(out: str | os.PathLike[str], needed: int) -> list[Problem]:
    """Whether the disk of the folder `out` has `needed` bytes left."""
    path = Path(out).expanduser().resolve()
    ancestor = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(ancestor).free
    if free >= needed:
        return []
    what = f"{needed} bytes are needed, {free} are free"
    return [Problem(str(out), what, "another disk, or free some space", True)]


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
) -> Plan:
    """Plan a run.

    Args:
        source: name to show.
        config: configuration of the model, of transformers.
        headers: what the checkpoint's files hold, see `stored.tensor_headers`.
        recipe: what shall be done.
        ranks: numbers of GPUs that shall share the result by tensor parallelism.
        out: where it shall be written.
    """
    model = outline(config, model_dtype(config, headers))
    parameters = sum(p.numel() for p in model.parameters())
    check_experts(model, recipe)
    shapes = quantizable(model, recipe.lm_head)
    problems = group_problems(shapes, recipe)
    problems += [p for n in ranks for p in parallel_problems(model, shapes, recipe, n)]
    serving = tuple(engines(model, shapes, recipe))
    # A stack of experts is a parameter itself; a tied output layer shares one.
    tensors = dict(model.named_parameters(remove_duplicate=False))
    counts = {n: (tensors[n] if n in tensors else tensors[f"{n}.weight"]).numel() for n in shapes}
    chosen = {n: s for n in shapes if (s := recipe.scheme_for(n)) and s.divides(shapes[n][1])}
    pack_outline(model, chosen)
    size = stored_bytes(model, set(headers))
    packed = sum(
        p.nbytes
        for _, module in packed_modules(model)
        for key, p in module.named_parameters()
        if "bias" not in key
    )
    weights = sum(counts[name] for name in chosen)
    return Plan(
        source=source,
        parameters=parameters,
        matrices=len(chosen),
        quantized_weights=weights,
        source_bytes=sum(header.nbytes for header in headers.values()),
        output_bytes=size,
        bits_per_weight=8 * packed / weights if weights else 0.0,
        problems=(*problems, *disk_problems(out, size)),
        engines=serving,
    )


def model_dtype(config: Any, headers: Mapping[str, Header]) -> torch.dtype:
    """The dtype in which transformers loads a checkpoint: its config's, or the files' first."""
    if config.dtype is not None:
        return config.dtype
    floats = [DTYPES[h.dtype] for h in headers.values() if h.dtype in DTYPES]
    return next((dtype for dtype in floats if dtype.is_floating_point), torch.float32)
