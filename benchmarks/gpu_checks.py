"""What `on_gpu.py` checks before it measures: every format, and the operators in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, KeyError)


def ours(x, weight, gpu, out_dtype=None, pdl=False):
    """x @ W.T by the launch that the operators would choose, on any device."""
    from llmq_kernels import launch, ops, plan

    N, K = weight.shape
    chosen = plan.choose(gpu, weight.bits, weight.group_size, N, K, x.shape[0])
    if chosen is None:
        return ops.dense(x, weight, None)
    return launch.linear(x, weight, None, chosen, pdl=pdl, out_dtype=out_dtype)


def distance(a, exact) -> float:
    """Relative Frobenius error."""
    return ((a.double() - exact).norm() / exact.norm()).item()


def checks(report, device, gpu, formats, shapes, rows) -> None:
    """Every format against float64, twice with the same bits.

    `batch_invariant`: whether the first row has the same bits for every number of rows up to 64.
    """
    import torch

    from llmq_kernels import launch, reference, tune

    for bits, group, symmetric, dtype in formats:
        for N, K in shapes:
            if report.left() < 20 or (group != -1 and K % group):
                continue
            weight = tune.random_weight(N, K, bits, group, symmetric, device)
            x = torch.randn(max(rows), K, device=device).to(dtype)
            matrix = launch.dequantize(weight, torch.float32)
            W = reference.dequantize(weight, torch.float64)
            worst, same, firsts = 0.0, True, []
            for M in rows:
                y = ours(x[:M], weight, gpu)
                same &= torch.equal(y, ours(x[:M], weight, gpu))
                exact = x[:M].double() @ W.T
                dense = torch.nn.functional.linear(x[:M], W.to(dtype))
                worst = max(worst, distance(y, exact) / distance(dense, exact))
                firsts += [y[0]] * (M <= 64)
            exact_matrix = torch.equal(matrix, reference.dequantize(weight, torch.float32))
            clean = not weight.counters.any().item()
            report.add(
                "check", bits=bits, group=group, symmetric=symmetric, dtype=str(dtype), N=N, K=K,
                error_over_dense=worst, same_bits=same, dequantize_exact=exact_matrix,
                batch_invariant=all(torch.equal(f, firsts[0]) for f in firsts),
                ok=worst <= 2 and same and exact_matrix and clean,
            )  # fmt: skip


def operator_checks(report, device) -> None:
    """The operators as models use them: compile, CUDA graph, gradient, experts, PDL."""
    import torch

    from llmq_kernels import layout, ops, reference, tune

    weight = tune.random_weight(512, 1024, 4, 128, False, device)
    x = torch.randn(3, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    W = reference.dequantize(weight, torch.float64)
    exact = x.detach().double() @ W.T

    def close(a, b, bar: float = 0.01) -> bool:
        return distance(a, b) < bar

    y = ops.linear(x, weight)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    report.add("operator", what="forward", ok=close(y, exact))
    expected = torch.ones_like(exact) @ W
    report.add("operator", what="gradient", ok=close(gradient, expected))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x: ops.linear(x, weight) * 2, fullgraph=True, backend=backend)
    try:
        same = torch.equal(compiled(x.detach()), 2 * y)
        report.add("operator", what="compile fullgraph", ok=same)
    except FAILURES as error:
        report.add("operator", what="compile fullgraph", ok=False, error=str(error)[-300:])
    stacked = layout.stack([tune.random_weight(256, 512, 4, 64, False, device) for _ in range(8)])
    tokens = torch.randn(5, 512, device=device, dtype=torch.bfloat16)
    chosen = torch.randint(0, 8, (5, 2), device=device)
    routed = reference.linear_experts(tokens.double(), stacked, chosen)
    report.add(
        "operator", what="experts", ok=close(ops.linear_experts(tokens, stacked, chosen), routed)
    )
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) >= (9, 0):
        fast = ops.linear(x.detach(), weight, pdl=True)
        report.add("operator", what="pdl same bits", ok=torch.equal(fast, y))
    static = x.detach().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.linear(static, weight)
    static.copy_(torch.randn_like(static))
    for _ in range(3):
        graph.replay()
    report.add("operator", what="CUDA graph", ok=torch.equal(captured, ops.linear(static, weight)))


def sanitizer(report) -> None:
    """The checks of one small format under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        report.add("sanitizer", what="not installed")
        return
    script = str(Path(__file__).with_name("on_gpu.py"))
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    command += ["--only", "one", "--minutes", "1", "--out", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        report.add("sanitizer", what="memcheck", ok=done.returncode == 0, tail=done.stdout[-300:])
    except subprocess.TimeoutExpired:
        report.add("sanitizer", what="memcheck", tail="did not end within 60 seconds")


def all_formats(dry: bool):
    """(bits, group, symmetric, dtype)"""
    import torch

    if dry:
        return [(4, 64, False, torch.float16), (4, 128, True, torch.bfloat16)]
    found = []
    for bits in (4, 8, 3, 2):
        for i, group in enumerate((128, 64, 32, -1)):
            kinds = [(True, torch.bfloat16), (False, torch.float16), (False, torch.bfloat16)]
            kinds = kinds if bits == 4 else [kinds[(bits + i) % 3]]
            found += [(bits, group, symmetric, dtype) for symmetric, dtype in kinds]
    return found
