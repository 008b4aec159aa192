"""The solvers' loops on a GPU: do kernels agree with torch, and what they are worth."""

from __future__ import annotations

import time

from gpu_checks import failures


def solvers(report, device, dry: bool) -> None:
    """The check, then the loops of a block of columns, then a whole matrix."""
    from llmq.solvers import loops

    try:
        why = loops.disagreement(device)
        report.add("operator", what="loops of solvers", ok=why is None, why=why)
    except failures() as error:
        report.add("operator", what="loops of solvers", ok=False, error=str(error)[-500:])
        return
    if dry:
        return
    for columns, rows in ((32, 512), (32, 4096), (128, 512), (128, 4096)):
        _loops(report, device, columns, rows)
    for K in (4096, 14336):
        _matrix(report, device, 4096, K)


def _loops(report, device, columns: int, rows: int) -> None:
    """The three loops over a block of columns, by kernels and by torch."""
    import torch

    from llmq.solvers import loops
    from llmq_kernels import solve

    x = torch.randn(4 * columns, columns, device=device)
    H = x.T @ x / len(x)
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1).contiguous()
    W, debt, away = (torch.randn(columns, rows, device=device) for _ in range(3))
    group = torch.zeros(columns, dtype=torch.int64, device=device)
    grid = torch.full((1, rows), 0.2, device=device), torch.full((1, rows), 8.0, device=device)
    scales, zeros = (t.expand(16, rows).contiguous() for t in grid)
    codes = torch.full_like(W, 8.0)
    pairs = {
        "round": (
            lambda: solve.round_columns(W.clone(), debt, R, grid, group, 15),
            lambda: loops._round_columns(W.clone(), debt.clone(), R, grid, group, 15),
        ),
        "trials of 16 grids": (
            lambda: solve.trial_errors(W, R, scales, zeros, 15),
            lambda: loops._trial_errors(W, R, scales, zeros, 15),
        ),
        "descent": (
            lambda: solve.move_codes(codes.clone(), away, H, 15),
            lambda: loops._moved_codes(codes, away, H, 15),
        ),
    }
    for what, (kernel, plain) in pairs.items():
        values = {"seconds": _seconds(kernel, 20), "seconds_torch": _seconds(plain, 3)}
        report.add("solver", what=what, columns=columns, rows=rows, **values)


def _matrix(report, device, N: int, K: int) -> None:
    """A whole matrix, without feedback between rows."""
    import torch

    from llmq.scheme import QuantScheme
    from llmq.solvers.descent import Polished

    x = torch.randn(2 * K, K, device=device)
    H, W = x.T @ x / len(x), torch.randn(N, K, device=device)
    scheme = QuantScheme(4, 128, symmetric=False)
    took = _seconds(lambda: Polished().solve(W, H, scheme), 1)
    report.add("solver", what="a matrix", columns=K, rows=N, seconds=took)


def _seconds(run, repeats: int) -> float:
    """Of one call, after one that is not counted."""
    import torch

    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats
