"""From how many rows on is the CPU's int4 kernel slower than dequantizing and a dense product?

    python benchmarks/cpu_rows.py [--bits 4 8 --group-size 64 --threads 2]

Both ways run in turns in one process, for every shape and number of rows; a row of the result
holds the median of the seconds of each way and their ratio. `CpuInt4.max_rows` and
`max_rows_of_two` follow from it. The matrices of one shape rotate, so that weights come from
memory as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment

from llmq.backends import CPU_INT4, TORCH
from llmq.nn import PackedLinear
from llmq.scheme import BITS, QuantizedWeight, QuantScheme

SHAPES = ((576, 1536), (1536, 576), (2048, 2048), (4096, 4096))  # (N, K)
ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
ROTATING = 64 << 20  # bytes of packed weights of one shape


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=BITS)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_rows.json"))
    return parser.parse_args()


def layer(N: int, K: int, scheme: QuantScheme) -> PackedLinear:
    """Random codes; speed does not depend on their values."""
    groups = K // scheme.group_width(K)
    weight = QuantizedWeight(
        scheme,
        torch.randint(0, 2**scheme.bits, (N, K), dtype=torch.uint8),
        torch.rand(N, groups).bfloat16() / 100,
        torch.full((N, groups), scheme.middle, dtype=torch.uint8),
    )
    packed = PackedLinear.from_quantized(weight, None)
    packed.prepare()
    return packed


def compare(layers: list[PackedLinear], rows: int, repeats: int) -> dict[str, float]:
    """Median seconds of one product, either way."""
    x = torch.randn(rows, layers[0].in_features).bfloat16()
    kernel = replace(CPU_INT4, max_rows=rows, max_rows_of_two=rows)
    seconds: dict[str, list[float]] = {"kernel": [], "dense": []}
    for i in range(repeats + 1):
        one = layers[i % len(layers)]
        for name, way in (("kernel", kernel), ("dense", TORCH)):
            start = time.perf_counter()
            way.matmul(x, one)
            seconds[name].append(time.perf_counter() - start)
    result = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {**result, "kernel/dense": result["kernel"] / result["dense"]}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = []
    for bits in args.bits:
        scheme = QuantScheme(bits, args.group_size, True)
        for N, K in SHAPES:
            layers = [layer(N, K, scheme) for _ in range(max(2, ROTATING // (N * K)))]
            for rows in ROWS:
                with torch.inference_mode():
                    found = compare(layers, rows, args.repeats)
                table.append({"bits": bits, "N": N, "K": K, "rows": rows, **found})
                print(f"{bits} bits {N:5} x {K:5}  {rows:4} rows  {found['kernel/dense']:6.2f}")
    report = {
        "environment": environment(args.threads),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "group_size": args.group_size,
        "rows": table,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
