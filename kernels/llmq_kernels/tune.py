"""Find the fastest launches for this GPU and write them down for `plan.choose`.

    python -m llmq_kernels.tune --shape 4096x4096 --shape 28672x4096 --bits 4 --group 128

Shapes are N x K, as the layer stores its weight. Tries every sensible launch for each number of
rows, with weights that do not fit the cache, and merges the winners into tuned/<GPU>.json beside
this file. Nothing is ever tuned while a model runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import layout, ops
from .layout import PackedWeight
from .plan import M_BUCKETS, TILE, TUNED, UNIT, Gpu, Plan, closed_form, shared_bytes
from .timing import copies, microseconds

SHAPES = (
    "4096x4096", "6144x4096", "28672x4096", "4096x14336", "8192x8192", "10240x8192",
    "57344x8192", "8192x28672",
)  # fmt: skip
DENSE_FROM = 64  # rows from which dequantizing and a dense product are worth trying


def candidates(gpu: Gpu, bits: int, group_size: int, N: int, K: int, M: int) -> list[Plan]:
    """Launches worth trying: the closed form, then the others.

    Their order is random but fixed, so that a search that is cut short has seen a fair sample.
    """
    first = closed_form(gpu, bits, group_size, N, K, M)
    steps = -(-K // UNIT)
    found = [first]
    for tiles, block_m, unroll, split, warps, stages in itertools.product(
        (1, 2), (16, 32, 64, 128), (1, 2, 4), (1, 2, 4, 8, 16), (4, 8), (2, 3, 4, 6)
    ):
        bytes_needed = stages * unroll * UNIT * (64 * tiles * bits // 8 + 2 * block_m)
        programs = -(-N // (TILE * tiles)) * split * -(-M // block_m)
        sensible = (
            block_m <= max(16, 2 * M)
            and M <= 4 * block_m
            and steps % unroll == 0
            and unroll * UNIT <= 512
            and split <= max(1, K // 512)
            and gpu.processors // 2 <= programs <= 16 * gpu.processors
            and bytes_needed <= shared_bytes(gpu.capability)
            and (warps == 4 or tiles == 2 or block_m >= 64)
        )
        if sensible:
            found.append(Plan(tiles, block_m, unroll, split, warps, stages, first.maxnreg))
    others = list(dict.fromkeys(found[1:]))
    random.Random(0).shuffle(others)
    return list(dict.fromkeys([first, *others]))


def random_weight(
    N: int, K: int, bits: int, group_size: int, symmetric: bool, device: torch.device
) -> PackedWeight:
    """Random codes in the packed layout, made on the device."""
    groups = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
    scale = (torch.rand(N, groups, device=device) * 0.02 + 0.01).bfloat16()
    zero = torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8, device=device)
    return layout.pack(codes, scale, None if symmetric else zero, bits=bits, group_size=group_size)


def clones(weight: PackedWeight, count: int) -> list[PackedWeight]:
    """The same weight at different addresses, scales and zero points too, so that all is cold."""
    return [weight, *(_clone(weight) for _ in range(count - 1))]


def _clone(weight: PackedWeight) -> PackedWeight:
    zero = None if weight.zero is None else weight.zero.clone()
    return replace(weight, qweight=weight.qweight.clone(), scale=weight.scale.clone(), zero=zero)


def tune(
    gpu: Gpu, weights: list[PackedWeight], M: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Plan | None, float]]:
    """Try every candidate for one shape: (number tried, number of them, plan, microseconds).

    With many rows, one of them is None: dequantize, then a dense product.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    N, K = weights[0].shape
    device = weights[0].qweight.device
    x = torch.randn(M, K, device=device).to(dtype)
    plans = candidates(gpu, weights[0].bits, weights[0].group_size, N, K, M)
    todo = [plans[0], *[None] * (M >= DENSE_FROM), *plans[1:]]
    for i, plan in enumerate(todo, start=1):
        calls = [partial(_product, x, weight, plan) for weight in weights]
        try:
            yield i, len(todo), plan, microseconds(calls, device=device)
        except (OutOfResources, CompilationError):
            yield i, len(todo), plan, float("inf")


def _product(x: torch.Tensor, weight: PackedWeight, plan: Plan | None) -> torch.Tensor:
    from . import launch

    return ops.dense(x, weight, None) if plan is None else launch.linear(x, weight, None, plan)


def save(gpu: Gpu, plans: dict[str, dict | str], folder: Path = TUNED) -> Path:
    """Merge launches into the GPU's table; "dense" stands for the dense product."""
    import triton

    path = folder / f"{gpu.name.replace(' ', '_')}.json"
    table = json.loads(path.read_text()) if path.is_file() else {"plans": {}}
    table |= {
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "processors": gpu.processors,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "plans": table["plans"] | plans,
    }
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return path


def main() -> int:
    """Tune the shapes asked for; exit status 1 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m llmq_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", action="append", help="N x K, e.g. 4096x14336; repeatable")
    parser.add_argument("--bits", type=int, default=4, choices=layout.BITS)
    parser.add_argument("--group", type=int, default=128, choices=layout.GROUP_SIZES)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=list(M_BUCKETS), help="rows of x")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA GPU here: nothing to tune.\n")
        return 1
    device = torch.device("cuda")
    gpu = ops.gpu(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    for shape in options.shape or SHAPES:
        N, K = map(int, shape.split("x"))
        weight = random_weight(N, K, options.bits, options.group, options.symmetric, device)
        weights = clones(weight, copies(weight.qweight.nbytes, cache))
        found = {}
        for M in options.rows:
            best, fastest = None, float("inf")
            for i, total, plan, taken in tune(gpu, weights, M, getattr(torch, options.dtype)):
                if taken < fastest:
                    best, fastest = plan, taken
                done = "#" * (30 * i // total)
                sys.stderr.write(f"\r{shape} M={M:<4} [{done:30}] {i}/{total}  {fastest:8.1f} us ")
                sys.stderr.flush()
            sys.stderr.write("\n")
            if fastest < float("inf"):
                key = f"{options.bits}/{options.group}/{N}/{K}/{M}"
                found[key] = "dense" if best is None else best._asdict()
        sys.stderr.write(f"wrote {save(gpu, found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
