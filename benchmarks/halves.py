"""How fast does this CPU multiply in float16, bfloat16 and float32, and in which do blocks run?

    python benchmarks/halves.py

One thread, 512 rows of activations times a square matrix: transposed as layers take it, and as it
is on the way back.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from environment import environment
from torch.nn import functional as F

from llmq.adapters import run_dtype

SIZES = (576, 1536)
ROWS = 512
HALVES = (torch.float16, torch.bfloat16)


def speed(size: int, dtype: torch.dtype, back: bool) -> float:
    """Operations per second of CPU time, in 1e9."""
    x, W = torch.rand(ROWS, size).to(dtype), torch.rand(size, size).to(dtype)
    product = torch.matmul if back else F.linear
    product(x, W)
    start, runs = time.process_time(), 0
    while runs < 3 or time.process_time() - start < 1:
        product(x, W)
        runs += 1
    return 2e-9 * ROWS * size**2 * runs / (time.process_time() - start)


def main() -> None:
    torch.set_num_threads(1)
    found = {
        str(dtype).removeprefix("torch."): {
            f"{size} {'back' if back else 'forth'}": round(speed(size, dtype, back), 2)
            for size in SIZES
            for back in (False, True)
        }
        for dtype in (torch.float32, *HALVES)
    }
    runs = {str(d).removeprefix("torch."): str(run_dtype(d, torch.device("cpu"))) for d in HALVES}
    result = {
        "environment": environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gflops": found,
        "blocks_run_in": runs,
    }
    print(json.dumps(result, indent=1))
    path = Path(__file__).parent / "results" / "halves.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
