"""Rows of `on_gpu.py` that time single products: ours beside the dense one and the peers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_checks import distance, failures, ours
from gpu_peers import present

from llmq_kernels import layout, reference, tune
from llmq_kernels.timing import copies, microseconds

SLOW = 60  # seconds after which a contender gets no more rows of one shape: some tune themselves
MOST_ROWS = {"tinygemm": 256}  # beyond, it takes up to twenty times the dense product's time


def bandwidth(report, device: torch.device, size: int) -> float:
    """GB/s of reading a large tensor once: the roof that percentages refer to; measured once."""
    for row in report.rows:
        if row["kind"] == "bandwidth":
            return row["gb_per_s"]
    data = torch.ones(size, dtype=torch.float32, device=device)
    taken = microseconds([lambda: torch.sum(data)] * 3, device=device)
    rate = data.nbytes / taken / 1e3
    report.add("bandwidth", gb_per_s=rate, bytes=data.nbytes)
    return rate


def cache_bytes(device: torch.device) -> int:
    """The second-level cache, which weights must not fit."""
    if device.type != "cuda":
        return 1 << 11
    return torch.cuda.get_device_properties(device).L2_cache_size


def contenders(
    weight: layout.PackedWeight, codes, scale, zero, gpu, cache: int, peers: bool
) -> dict[str, Callable[[], list[Any]]]:
    """What makes functions of x, each with its own copy of this weight, by contender.

    The dense product first: every later row carries its ratio to it, from this same run.
    """
    dtype = scale.dtype
    packed = copies(weight.qweight.nbytes, cache)

    def dense() -> list[Any]:
        W = reference.dequantize(weight, dtype)
        several = [W, *(W.clone() for _ in range(copies(W.nbytes, cache) - 1))]
        return [lambda x, W=W: torch.nn.functional.linear(x, W) for W in several]

    def mine() -> list[Any]:
        return [lambda x, w=w: ours(x, w, gpu) for w in tune.clones(weight, packed)]

    def peer(maker) -> list[Any]:
        first = maker(codes, scale, zero, weight.group_size, dtype)
        if first is None:
            return []
        rest = (maker(codes, scale, zero, weight.group_size, dtype) for _ in range(packed - 1))
        return [first, *rest]

    here = present() if scale.is_cuda else {}
    others = {n: partial(peer, make) for n, make in here.items() if (n != "tinygemm") == peers}
    return {"dense": dense} | ({} if peers else {"ours": mine}) | others


def times(
    report,
    device: torch.device,
    gpu,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    roof: float,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 128,
    symmetric: bool = True,
    peers: bool = False,
) -> None:
    """One shape after the other, cold weights: the dense product, ours and tinygemm.

    With `peers`, the dense product and whoever else is installed. A row "agreement" says how far a
    contender's result is from the float32 product: one that is wrong is not timed for nothing.
    """
    cache = cache_bytes(device)
    for N, K in shapes:
        if report.left() < 15:
            report.add("stopped", N=N, K=K, why="out of time")
            return
        groups = 1 if group == -1 else K // group
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
        scale = (torch.rand(N, groups, device=device) * 0.02 + 0.01).to(dtype)
        zero = torch.full((N, groups), 8, dtype=torch.uint8, device=device)
        if not symmetric:
            zero.random_(0, 16)
        weight = layout.pack(codes, scale, None if symmetric else zero, bits=4, group_size=group)
        where = {"N": N, "K": K, "group": group, "symmetric": symmetric}
        where["dtype"] = str(dtype).removeprefix("torch.")
        some = torch.randn(2, K, device=device).to(dtype)
        exact = some.float() @ reference.dequantize(weight, torch.float32).T
        dense_us: dict[int, float] = {}
        for name, make in contenders(weight, codes, scale, zero, gpu, cache, peers).items():
            try:
                if not (products := make()):
                    continue
                found = distance(products[0](some), exact)
            except failures() as error:
                report.add("time", name=name, error=str(error)[:300], **where)
                continue
            report.add("agreement", name=name, distance=found, **where)
            _rows(report, device, name, products, rows, where, dense_us, roof, weight)


def _rows(
    report,
    device: torch.device,
    name: str,
    products: list[Any],
    rows: Sequence[int],
    where: dict[str, Any],
    dense_us: dict[int, float],
    roof: float,
    weight: layout.PackedWeight,
) -> None:
    """Every number of rows for one contender and shape; failures are rows too."""
    end = time.monotonic() + SLOW
    for M in rows:
        row = {"name": name, "M": M} | where
        if M > MOST_ROWS.get(name, M):
            continue
        if time.monotonic() > end or report.left() < 5:
            report.add("time", **row, error="out of time")
            continue
        try:
            x = torch.randn(M, where["K"], device=device).to(weight.scale.dtype)
            us = microseconds([partial(product, x) for product in products], device=device)
        except failures() as error:
            report.add("time", **row, error=str(error)[:300])
            continue
        row["us"] = us
        if name == "dense":
            dense_us[M] = us
        if M in dense_us:
            row["over_dense"] = dense_us[M] / us
        if name == "ours":
            zeros = 0 if weight.zero is None else weight.zero.nbytes
            nbytes = weight.qweight.nbytes + weight.scale.nbytes + zeros
            row |= {
                "bytes": nbytes,
                "gb_per_s": nbytes / us / 1e3,
                "of_roof": nbytes / us / 1e3 / roof,
            }
        report.add("time", **row)


def search(
    report, device: torch.device, gpu, shapes: Sequence[tuple[int, int]], rows: Sequence[int]
) -> None:
    """A short search over launches: what a tuned table would gain over the closed form."""
    todo = list(itertools.product(shapes, rows))
    for i, ((N, K), M) in enumerate(todo):
        weight = tune.random_weight(N, K, 4, 128, True, device)
        weights = tune.clones(weight, copies(weight.qweight.nbytes, cache_bytes(device)))
        end = time.monotonic() + report.left() / (len(todo) - i)
        found = []
        try:
            for at, _, plan, us in tune.tune(gpu, weights, M, torch.bfloat16):
                found.append((us, at, plan))
                if time.monotonic() > end or report.left() < 5:
                    break
        except failures() as error:
            report.add("search", N=N, K=K, M=M, error=str(error)[:300])
        if found:
            us, _, plan = min(found)
            row = {"N": N, "K": K, "M": M, "us": us, "closed_form_us": found[0][0]}
            name = "dense" if plan is None else plan._asdict()
            report.add("search", **row, tried=len(found), plan=name)
