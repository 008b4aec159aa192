"""Everything there is to check and measure on a machine with a GPU, in under ten minutes.

    python benchmarks/on_gpu.py                      # writes benchmarks/results/gpu_<name>.json
    python benchmarks/on_gpu.py --minutes 3 --out x.json
    python benchmarks/on_gpu.py --dry-run            # no GPU: Triton's interpreter, tiny shapes

Order: correctness of every format, bits equal on every run and for every number of rows, CUDA
graph, compile, gradient, stacked experts, compute-sanitizer if installed; then read bandwidth; then
times beside bf16 cuBLAS, torch's tinygemm and the peers of gpu_peers.py, most important rows
first; at the end, for which time is kept, chains of layers and whole models (gpu_decode.py). Rows
are written as they are measured; exit status 1 if a check failed. kernels.py makes tables of the
result, plot.py charts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_checks import FAILURES, all_formats, checks, operator_checks, ours, sanitizer

ROOT = Path(__file__).resolve().parents[1]

KEPT = 170  # seconds for the last sections: making an 8B model, capturing, compiling
SHAPES = [  # N x K: q/k/v, o, gate/up, down of 8B and 70B Llamas, a head, Qwen3-32B, 0.6B
    (28672, 4096), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 8192), (6144, 4096),
    (10240, 8192), (8192, 28672), (128256, 4096), (8192, 5120), (5120, 25600), (1024, 3072),
]  # fmt: skip
FIRST_ROWS = (1, 16, 64, 256, 2048)
OTHER_ROWS = (2, 4, 8, 32, 48, 96, 128, 512, 1024, 4096)


class Report:
    """Rows, flushed to a JSON file as they come, and the time that is left."""

    def __init__(self, path: Path, minutes: float, head: dict) -> None:
        self.path, self.head, self.rows = path, head, []
        self.failed = 0
        self.end = time.monotonic() + 60 * minutes
        self.kept = 0.0  # seconds at the end that the present section must leave

    def add(self, kind: str, **values: object) -> None:
        """Append a row, print it, write everything."""
        self.rows.append({"kind": kind} | values)
        self.failed += values.get("ok") is False
        print(kind, *(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        self.path.write_text(json.dumps({"environment": self.head, "rows": self.rows}, indent=1))

    def left(self) -> float:
        """Seconds that the present section has."""
        return self.end - self.kept - time.monotonic()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bandwidth(report: Report, device, size: int) -> float:
    """GB/s of reading a large tensor once: the roof that percentages refer to."""
    import torch

    from llmq_kernels.timing import microseconds

    data = torch.ones(size, dtype=torch.float32, device=device)
    taken = microseconds([lambda: torch.sum(data)] * 3, device=device)
    rate = data.nbytes / taken / 1e3
    report.add("bandwidth", gb_per_s=rate, bytes=data.nbytes)
    return rate


def contenders(weight, codes, scale, zero, dtype, cache: int) -> Iterator[tuple[str, list]]:
    """Other ways to multiply by this weight: (name, functions of x, each with its own copy)."""
    import torch
    from gpu_peers import present

    from llmq_kernels import reference
    from llmq_kernels.timing import copies

    W = reference.dequantize(weight, dtype)
    dense = [W, *(W.clone() for _ in range(copies(W.nbytes, cache) - 1))]
    yield "dense", [lambda x, W=W: torch.nn.functional.linear(x, W) for W in dense]
    del dense
    for name, maker in present().items():
        try:
            made = [maker(codes, scale, zero, weight.group_size, dtype)]
            if made[0] is not None:
                more = copies(weight.qweight.nbytes, cache) - 1
                made += [maker(codes, scale, zero, weight.group_size, dtype) for _ in range(more)]
                yield name, made
        except FAILURES as error:
            print(name, "cannot be prepared:", str(error)[:200])


def times(
    report: Report, device, gpu, shapes, rows, roof: float, group: int = 128, dtype=None
) -> None:
    """One shape after the other: ours beside the dense product and the peers, cold weights."""
    import torch

    from llmq_kernels import layout, tune
    from llmq_kernels.timing import copies, microseconds

    cache = 1 << 11
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    dtype = dtype or torch.bfloat16
    for N, K in shapes:
        if report.left() < 20:
            report.add("stopped", N=N, K=K, why="out of time")
            return
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
        scale = (torch.rand(N, K // group, device=device) * 0.02 + 0.01).to(dtype)
        zero = torch.full((N, K // group), 8, dtype=torch.uint8, device=device)
        weight = layout.pack(codes, scale, None, bits=4, group_size=group)
        bytes_read = weight.qweight.nbytes + weight.scale.nbytes
        weights = tune.clones(weight, copies(bytes_read, cache))
        dense_us = {}
        ours_here = [lambda x, w=w: ours(x, w, gpu) for w in weights]
        others = contenders(weight, codes, scale, zero, dtype, cache)
        # The dense product first: every later row carries its ratio to it, from this same run.
        named = [next(others), ("ours", ours_here)]
        for name, products in itertools.chain(named, others):
            for M in rows:
                x = torch.randn(M, K, device=device, dtype=dtype)
                row = {"name": name, "N": N, "K": K, "M": M, "group": group}
                row["dtype"] = str(dtype).removeprefix("torch.")
                try:
                    calls = [lambda p=p, x=x: p(x) for p in products]
                    us = microseconds(calls, device=device)
                except FAILURES as error:
                    report.add("time", **row, error=str(error)[:200])
                    continue
                if name == "dense":
                    dense_us[M] = us
                row |= {"us": us, "over_dense": dense_us[M] / us}
                if name == "ours":
                    rate = bytes_read / us / 1e3
                    row |= {"gb_per_s": rate, "of_roof": rate / roof, "bytes": bytes_read}
                report.add("time", **row)


def search(report: Report, device, gpu, shapes, rows, seconds: float) -> None:
    """A short search over launches: what a tuned table would gain over the closed form."""
    import torch

    from llmq_kernels import tune
    from llmq_kernels.timing import copies

    for N, K in shapes:
        weight = tune.random_weight(N, K, 4, 128, True, device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        weights = tune.clones(weight, copies(weight.qweight.nbytes, cache))
        for M in rows:
            end = time.monotonic() + seconds / (len(shapes) * len(rows))
            found = []
            for i, _, plan, us in tune.tune(gpu, weights, M, torch.bfloat16):
                found.append((us, i, plan))
                if time.monotonic() > end or report.left() < 20:
                    break
            us, _, plan = min(found)
            row = {"N": N, "K": K, "M": M, "us": us, "closed_form_us": found[0][0]}
            report.add("search", **row, tried=len(found), plan=plan._asdict())


def measurements(report: Report, device, gpu, dry: bool) -> None:
    """Everything that is timed."""
    import torch
    from gpu_decode import chain, decoding

    roof = bandwidth(report, device, 1 << (16 if dry else 30))
    if dry:
        times(report, device, gpu, [(64, 128)], (1,), roof)
        times(report, device, gpu, [(64, 128)], (1,), roof, dtype=torch.float16)
        chain(report, device, gpu, 64, (1,), dry=True)
        decoding(report, device, roof, (1, 2), dry=True)
        return
    report.kept = KEPT
    times(report, device, gpu, SHAPES[:5], FIRST_ROWS, roof)
    search(report, device, gpu, SHAPES[:3], (1, 16, 64), seconds=min(90, report.left() / 3))
    times(report, device, gpu, SHAPES[5:], FIRST_ROWS, roof)
    times(report, device, gpu, SHAPES[:2], OTHER_ROWS, roof)
    times(report, device, gpu, SHAPES[:1], FIRST_ROWS, roof, group=64)
    times(report, device, gpu, SHAPES[:2], (1, 16, 64), roof, dtype=torch.float16)
    report.kept = 0
    chain(report, device, gpu, 4096, (1, 16))
    decoding(report, device, roof, (1, 16))


def main() -> int:
    """Run the sections in order of importance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", choices=("one", "checks", "times"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch
    from environment import environment

    from llmq_kernels import ops, plan

    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        print("No CUDA GPU here. --dry-run tries the script without one.", file=sys.stderr)
        return 1
    device = torch.device("cpu" if dry else "cuda")
    gpu = plan.Gpu("dry run", (9, 0), 4) if dry else ops.gpu(device)
    out = options.out or ROOT / f"benchmarks/results/gpu_{gpu.name.replace(' ', '_')}.json"
    report = Report(out, options.minutes, environment() | {"gpu": gpu._asdict()})
    if options.only == "one":
        checks(report, device, gpu, all_formats(dry)[:2], [(192, 512)], (1, 16))
        return int(report.failed > 0)
    if options.only != "times" and dry:
        checks(report, device, gpu, all_formats(dry), [(70, 128)], (1, 3))
        operator_checks(report, device)
    elif options.only != "times":
        main_format, others = all_formats(dry)[:12], all_formats(dry)[12:]
        rows = (1, 5, 16, 33, 64, 200, 600)
        checks(report, device, gpu, main_format, [(1030, 1536)], rows)
        checks(report, device, gpu, main_format[:1], [(4096, 4096)], rows)
        operator_checks(report, device)
        checks(report, device, gpu, others, [(1030, 1536), (70, 96)], (1, 33))
        sanitizer(report)
    if options.only != "checks":
        measurements(report, device, gpu, dry)
    print(f"{report.failed} checks failed; wrote {out}")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
