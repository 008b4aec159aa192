"""What `on_gpu.py` checks before it measures: every format, and the operators in use."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def failures() -> tuple[type[Exception], ...]:
    """What a row may fail with while the others go on: torch, triton, a compiler, a peer."""
    from triton.errors import TritonError

    return (
        TritonError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError,
        ImportError, LookupError, OSError, subprocess.SubprocessError,
    )  # fmt: skip


def ours(x, weight, gpu, pdl=False):
    """x @ W.T by the launch that the operators would choose, on any device."""
    from llmq_kernels import launch, ops, plan

    N, K = weight.shape
    chosen = plan.choose(gpu, weight.bits, weight.group_size, N, K, x.shape[0])
    if chosen is None:
        return ops.dense(x, weight, None)
    return launch.linear(x, weight, None, chosen, pdl=pdl)


def distance(a, exact) -> float:
    """Relative Frobenius error."""
    return ((a.double() - exact).norm() / exact.norm()).item()


def checks(report, device, gpu, formats, shapes, rows) -> None:
    """Every format against float64, twice with the same bits."""
    for format_, (N, K) in itertools.product(formats, shapes):
        if report.left() < 5:
            report.add("stopped", format=str(format_), why="out of time")
            return
        bits, group, symmetric, dtype = format_
        if group == -1 or K % group == 0:
            row = {"bits": bits, "group": group, "symmetric": symmetric, "N": N, "K": K}
            row["dtype"] = str(dtype).removeprefix("torch.")
            try:
                report.add("check", **row, **_check(device, gpu, format_, N, K, rows))
            except failures() as error:
                report.add("check", **row, ok=False, error=str(error)[-500:])


def _check(device, gpu, format_: tuple, N: int, K: int, rows) -> dict:
    """One format and shape.

    `batch_invariant`: whether the first row has the same bits for every number of rows up to 64.
    """
    import torch

    from llmq_kernels import launch, reference, tune

    bits, group, symmetric, dtype = format_
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
    return {
        "error_over_dense": worst,
        "same_bits": same,
        "dequantize_exact": exact_matrix,
        "counters_zero": clean,
        "batch_invariant": all(torch.equal(f, firsts[0]) for f in firsts),
        "ok": worst <= 2 and same and exact_matrix and clean,
    }


def operator_checks(report, device) -> None:
    """The operators as models use them: compile, CUDA graph, gradient, experts, PDL."""
    import torch

    from llmq_kernels import ops, reference, tune

    weight = tune.random_weight(512, 1024, 4, 128, False, device)
    x = torch.randn(3, 1024, device=device, dtype=torch.bfloat16)
    W = reference.dequantize(weight, torch.float64)

    def gradient() -> bool:
        inputs = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(ops.linear(inputs, weight).sum(), inputs)
        return distance(found, torch.ones(3, 512, device=device).double() @ W) < 0.01

    def compiled() -> bool:
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        twice = torch.compile(lambda x: ops.linear(x, weight) * 2, fullgraph=True, backend=backend)
        return torch.equal(twice(x), 2 * ops.linear(x, weight))

    def captured() -> bool:
        static = x.clone()
        ops.linear(static, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear(static, weight)
        static.copy_(torch.randn_like(static))
        for _ in range(3):
            graph.replay()
        return torch.equal(y, ops.linear(static, weight))

    tests = {
        "forward": lambda: distance(ops.linear(x, weight), x.double() @ W.T) < 0.01,
        "gradient": gradient,
        "experts": lambda: _experts(device),
        "compile fullgraph": compiled,
    }
    if device.type == "cuda":
        tests["CUDA graph"] = captured
        if torch.cuda.get_device_capability(device) >= (9, 0):
            tests["pdl same bits"] = lambda: torch.equal(
                ops.linear(x, weight, pdl=True), ops.linear(x, weight)
            )
    for what, test in tests.items():
        try:
            report.add("operator", what=what, ok=test())
        except failures() as error:
            report.add("operator", what=what, ok=False, error=str(error)[-500:])


def _experts(device) -> bool:
    import torch

    from llmq_kernels import layout, ops, reference, tune

    stacked = layout.stack([tune.random_weight(256, 512, 4, 64, False, device) for _ in range(8)])
    tokens = torch.randn(5, 512, device=device, dtype=torch.bfloat16)
    chosen = torch.randint(0, 8, (5, 2), device=device)
    exact = reference.linear_experts(tokens.double(), stacked, chosen)
    return distance(ops.linear_experts(tokens, stacked, chosen), exact) < 0.01


def sanitizer(report) -> None:
    """The checks of one small format under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        report.add("sanitizer", what="not installed")
        return
    script = str(Path(__file__).with_name("on_gpu.py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
        command += ["--section", "one", "--seconds", "50", "--out", f"{folder}/rows.json"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=report.left(), check=False
            )
            ok = done.returncode == 0
            report.add("sanitizer", what="memcheck", ok=ok, tail=done.stdout[-300:])
        except subprocess.TimeoutExpired:
            report.add("sanitizer", what="memcheck", tail="did not end in time")


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
