"""Every case of the fused and the dequantizing kernel, run by Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels_cases.py default|full|experts [name ...]
    TRITON_INTERPRET=1 python tests/kernels_cases.py formats|selfcheck|solvers

The interpreter is chosen when triton is imported, hence a process of its own (see
test_kernels_interpreter.py). One JSON object per case on standard output.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
from typing import NamedTuple


def interpreter_runs() -> bool:
    """triton 3.6's makes numbers of arrays with one element, which numpy refuses from 2.4 on."""
    triton, numpy = (
        tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
        for name in ("triton", "numpy")
    )
    return triton >= (3, 7) or (triton == (3, 6) and numpy < (2, 4))


BITS = (4, 8, 3, 2)
GROUPS = (128, 64, 32, -1)


class Case(NamedTuple):
    """One shape, format and launch."""

    bits: int
    group: int
    symmetric: bool
    dtype: str
    M: int
    N: int
    K: int
    tiles: int = 1
    block_m: int = 16
    unroll: int = 1
    split: int = 1
    bias: bool = False
    scale: str = ""  # dtype of the scales, if not the activations'

    def name(self) -> str:
        """One word, used to choose it."""
        fields = zip(self._fields, self, strict=True)
        return "-".join(f"{k}={v}" for k, v in fields if v != self._field_defaults.get(k))


def formats() -> list[Case]:
    """Every (bits, group, symmetry, dtype) at an odd shape, with split-K."""
    return [
        Case(bits, group, symmetric, dtype, M=3, N=70, K=256, split=2, bias=symmetric)
        for bits, group, symmetric, dtype in itertools.product(
            BITS, GROUPS, (True, False), ("bfloat16", "float16")
        )
    ]


def shapes() -> list[Case]:
    """Odd shapes and launches: padding of N and K, ragged split, wide tiles, many rows."""
    return [
        Case(4, 32, False, "bfloat16", M=1, N=130, K=96, bias=True),
        Case(8, 32, True, "float16", M=1, N=64, K=32),
        Case(2, 32, False, "bfloat16", M=2, N=65, K=160),
        Case(3, 64, False, "float16", M=5, N=64, K=320, split=2),
        Case(2, 64, True, "bfloat16", M=1, N=1, K=64),
        Case(4, -1, False, "bfloat16", M=19, N=130, K=200, tiles=2),
        Case(3, -1, False, "bfloat16", M=7, N=64, K=104),
        Case(8, -1, True, "bfloat16", M=7, N=64, K=72),
        Case(4, 64, False, "float16", M=19, N=128, K=512, tiles=2, block_m=32, unroll=2, split=3),
        Case(4, 128, False, "bfloat16", M=33, N=256, K=512, tiles=2, block_m=64, split=4),
        Case(4, 128, True, "bfloat16", M=131, N=128, K=256, tiles=2, block_m=128, unroll=2),
        Case(4, 32, True, "bfloat16", M=17, N=192, K=256, unroll=4, split=3),
        Case(4, 128, True, "float16", M=4, N=64, K=640, split=5, scale="float32"),
        Case(3, 128, False, "float16", M=1, N=64, K=384, split=8, scale="bfloat16"),
    ]


def chosen() -> list[Case]:
    """The default suite's share: each (bits, group) once, with the rest alternating; all shapes."""
    kept = {}
    for i, case in enumerate(formats()):
        if i % 4 == (i // 4 + i // 16) % 4:
            kept[case.bits, case.group] = case
    return [*kept.values(), *shapes()]


def full() -> list[Case]:
    """Formats x launches x shapes, thinned: each format meets two of the nine (launch, shape).

    Any three of bits, group, symmetry, dtype, launch and shape still meet in every combination
    (a test counts them), in 128 cases instead of 576.
    """
    launches = ((1, 16, 1, 1), (2, 32, 2, 3), (1, 64, 4, 2))  # tiles, block_m, unroll, split
    shapes = ((1, 64, 1), (17, 190, 3), (40, 128, 8))  # M, N, blocks
    both = list(itertools.product(launches, shapes))
    found = []
    every = itertools.product(BITS, GROUPS, (True, False), ("bfloat16", "float16"))
    for i, (bits, group, symmetric, dtype) in enumerate(every):
        width = 40 if group == -1 else group
        for launch, (M, N, blocks) in (both[i % 9], both[(i + 4) % 9]):
            found.append(
                Case(bits, group, symmetric, dtype, M, N, width * blocks, *launch,
                     bias=not symmetric)
            )  # fmt: skip
    return found


def drawn(case: Case) -> tuple:
    """A random weight, x and bias."""
    import torch

    from llmq_kernels import layout

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    groups = 1 if case.group == -1 else case.K // case.group
    codes = torch.randint(0, 2**case.bits, (case.N, case.K), dtype=torch.uint8)
    scale = (torch.rand(case.N, groups) * 0.02 + 0.01).to(getattr(torch, case.scale or case.dtype))
    zero = torch.randint(0, 2**case.bits, (case.N, groups), dtype=torch.uint8)
    weight = layout.pack(
        codes, scale, None if case.symmetric else zero, bits=case.bits, group_size=case.group
    )
    x = torch.randn(case.M, case.K).to(dtype)
    return weight, x, torch.randn(case.N).to(dtype) if case.bias else None


def run(case: Case) -> dict:
    """Errors of one case against float64, relative to the Frobenius norm of the result."""
    import torch

    from llmq_kernels import launch, reference
    from llmq_kernels.plan import Plan

    dtype = getattr(torch, case.dtype)
    weight, x, bias = drawn(case)
    exact = reference.linear(x.double(), weight, bias)
    dense = reference.linear(x, weight, bias)
    plan = Plan(case.tiles, case.block_m, case.unroll, case.split)

    started = time.perf_counter()
    first = poisoned(lambda: launch.linear(x, weight, bias, plan, out_dtype=torch.float32))
    again = poisoned(lambda: launch.linear(x, weight, bias, plan, out_dtype=torch.float32))
    stored = poisoned(lambda: launch.linear(x, weight, bias, plan))
    matrix = poisoned(lambda: launch.dequantize(weight, torch.float32))
    short = poisoned(lambda: launch.dequantize(weight, dtype))
    return {
        "name": case.name(),
        "group": case.group,
        "error": distance(first.to(dtype), exact),
        "error_float32": distance(first, exact),
        "error_stored": distance(stored, exact),
        "stored_is_rounded": torch.equal(stored, first.to(dtype)),
        "dense": distance(dense, exact),
        "repeatable": torch.equal(first, again),
        "counters_zero": not weight.counters.any().item(),
        "dequantize": torch.equal(matrix, reference.dequantize(weight, torch.float32))
        and torch.equal(short, reference.dequantize(weight, dtype)),
        "seconds": time.perf_counter() - started,
    }


def run_briefly(case: Case) -> dict:
    """Errors of one case: the kernel once, in float32, where a wrong bit of a weight shows.

    And the dequantizing kernel, which is the same for all dtypes of x, for one of them.
    """
    import torch

    from llmq_kernels import launch, reference
    from llmq_kernels.plan import Plan

    weight, x, bias = drawn(case)
    exact = reference.linear(x.double(), weight, bias)
    plan = Plan(case.tiles, case.block_m, case.unroll, case.split)
    found = poisoned(lambda: launch.linear(x, weight, bias, plan, out_dtype=torch.float32))
    exactly = True
    if case.dtype == "bfloat16":
        matrix = poisoned(lambda: launch.dequantize(weight, torch.float32))
        exactly = torch.equal(matrix, reference.dequantize(weight, torch.float32))
    return {
        "name": case.name(),
        "group": case.group,
        "error": distance(found.to(x.dtype), exact),
        "error_float32": distance(found, exact),
        "dense": distance(reference.linear(x, weight, bias), exact),
        "counters_zero": not weight.counters.any().item(),
        "dequantize": exactly,
    }


def run_experts(name: str) -> dict:
    """The grouped kernel: tokens sent to stacked experts, one of which gets none."""
    import torch

    from llmq_kernels import launch, layout, reference
    from llmq_kernels.plan import Plan

    torch.manual_seed(0)
    split = 2 if name == "experts-split" else 1
    experts, tokens, top_k, N, K = 4, 9, 2, 70, 192
    packed = []
    for _ in range(experts):
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
        zero = torch.randint(0, 16, (N, K // 64), dtype=torch.uint8)
        scale = torch.rand(N, K // 64).bfloat16() * 0.02 + 0.01
        packed.append(layout.pack(codes, scale, zero, bits=4, group_size=64))
    weight = layout.stack(packed)
    chosen = torch.randint(0, experts - 1, (tokens, top_k))
    rows = tokens if split == 1 else tokens * top_k  # shared inputs, or one for each pair
    x = torch.randn(rows, K).bfloat16()
    exact = reference.linear_experts(x.double(), weight, chosen)
    plan = Plan(1, 16, 1, split)
    first, again = (
        poisoned(lambda: launch.linear_experts(x, weight, chosen, plan, out_dtype=torch.float32))
        for _ in range(2)
    )
    stored = poisoned(lambda: launch.linear_experts(x, weight, chosen, plan))
    return {
        "name": name,
        "group": 64,
        "error": distance(first.to(x.dtype), exact),
        "error_float32": distance(first, exact),
        "error_stored": distance(stored, exact),
        "stored_is_rounded": torch.equal(stored, first.to(x.dtype)),
        "dense": distance(reference.linear_experts(x, weight, chosen), exact),
        "repeatable": torch.equal(first, again),
        "counters_zero": not weight.counters.any().item(),
    }


def run_selfcheck() -> dict:
    """The check of a new device, with the launches that an H200 would get."""
    import torch

    from llmq_kernels import launch, ops, plan, selfcheck

    gpu = plan.Gpu("unknown", (9, 0), 132)

    def linear(x, weight, bias):
        N, K = weight.shape
        chosen = plan.choose(gpu, weight.bits, weight.group_size, N, K, len(x))
        if chosen is None:
            return ops.dense(x, weight, bias)
        return launch.linear(x, weight, bias, chosen)

    def linear_experts(x, weight, chosen):
        N, K = weight.shape
        grouped = plan.closed_form(gpu, weight.bits, weight.group_size, N, K, 3)
        return launch.linear_experts(x, weight, chosen, grouped)

    device = torch.device("cpu")
    reason = selfcheck.examine(device, 4, 32, False, torch.float16, linear, linear_experts)
    return {"name": "selfcheck", "reason": reason}


def distance(a, exact) -> float:
    """Relative Frobenius error; NaN if `a` has one."""
    return ((a.double() - exact).norm() / exact.norm()).item()


def poisoned(call):
    """Run with every new tensor full of NaN, so that an element never written is seen."""
    import torch

    real = torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        empty = real(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    torch.Tensor.new_empty = new_empty
    result = call()
    torch.Tensor.new_empty = real
    return result


SOLVER_SHAPES = ((32, 70), (128, 17), (20, 16), (100, 5), (64, 33))


def run_solvers(columns: int, rows: int) -> dict:
    """The solvers' loops by kernels and by torch in float64: what they disagree in."""
    import torch

    from llmq.solvers import loops
    from llmq_kernels import solve

    generator = torch.Generator().manual_seed(columns)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = drawn(4 * columns, columns) + drawn(4 * columns, 1)
    H = x.T @ x / len(x)
    H[:, 3] = H[3] = 0.0
    H[3, 3] = 1.0  # a column that never fired
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1).contiguous()
    W, debt, away = drawn(columns, rows), drawn(columns, rows) / 4, drawn(columns, rows)
    W[:, 1], W[5] = 0.0, 1e4  # a row of zeros, a column of outliers
    group = torch.arange(columns) // 16
    count = int(group[-1]) + 1
    grid = drawn(count, rows).abs() / 4 + 0.1, (drawn(count, rows) * 2 + 4).round().clamp(0, 7)
    begun = grid[1][group]
    lost, exact = W.clone(), W.double()
    codes = solve.round_columns(lost, debt, R, grid, group, 7)
    wide = grid[0].double(), grid[1].double()
    expected = loops._round_columns(exact, debt.double(), R.double(), wide, group, 7)
    errors = solve.trial_errors(W, R, *grid, 7)
    exact_errors = loops._trial_errors(W.double(), R.double(), *wide, 7)
    moved = begun.clone()
    solve.move_codes(moved, away, H, 7)
    best = loops._moved_codes(begun.double(), away.double(), H.double(), 7)
    again = begun.clone()
    solve.move_codes(again, away, H, 7)
    return {
        "codes": float((codes == expected).double().mean()),
        "lost": float(((lost - exact).abs() / exact.abs().clamp(min=1)).median()),
        "errors": float(((errors - exact_errors).abs() / exact_errors.clamp(min=1e-6)).median()),
        "moved": float((moved == best).double().mean()),
        "moves": float((moved != begun).double().mean()),
        "repeatable": torch.equal(moved, again),
    }


def main() -> None:
    """Run the chosen cases."""
    import torch

    torch.set_num_threads(1)
    if sys.argv[1] == "experts":
        for name in sys.argv[2:] or ("experts", "experts-split"):
            print(json.dumps(run_experts(name)), flush=True)  # noqa: T201
        return
    if sys.argv[1] == "selfcheck":
        print(json.dumps(run_selfcheck()))  # noqa: T201
        return
    if sys.argv[1] == "solvers":
        for columns, rows in SOLVER_SHAPES:
            print(json.dumps(run_solvers(columns, rows)), flush=True)  # noqa: T201
        return
    if sys.argv[1] == "formats":
        for case in formats():
            if case not in chosen():
                print(json.dumps(run_briefly(case._replace(N=37))), flush=True)  # noqa: T201
        return
    cases = full() if sys.argv[1] == "full" else [*formats(), *shapes()]
    for case in cases:
        if len(sys.argv) == 2 or case.name() in sys.argv[2:]:
            print(json.dumps(run(case)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
