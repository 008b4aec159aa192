"""What a low-rank correction wins back: KL of a 2-bit model without and with the adapter.

    python benchmarks/correction.py MODEL --calibration TEXT --text TEXT [--ranks 8 32]

Quantizes MODEL into a temporary folder, writes an adapter per rank with `llmq correct`, and judges
all on the same held-out windows: KL to full precision, perplexity, and the paired difference in
log-likelihood, each with its standard error. Rows go into one JSON file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment

from llmq import api, measure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--name", help="of the model in the table (default: its folder's)")
    parser.add_argument("--methods", nargs="+", default=["gptq"])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--ranks", nargs="+", type=int, default=[32])
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/correction.json"))
    return parser.parse_args()


def rows(options: argparse.Namespace, method: str, work: Path) -> list[dict[str, Any]]:
    """One row without an adapter and one per rank."""
    text = {"calibration": options.calibration, "samples": options.samples}
    text["seq_len"] = options.seq_len
    report = api.quantize(
        options.model,
        work / method,
        method=None if method in ("fast", "balanced") else method,
        quality=method if method in ("fast", "balanced") else None,
        bits=options.bits,
        group_size=options.group_size,
        skip=options.skip,
        device="cpu",
        **text,
    )
    found = []
    for rank in (0, *options.ranks):
        adapter, seconds = None, 0.0
        if rank:
            adapter, start = work / f"{method}-{rank}", time.perf_counter()
            api.correct(options.model, work / method, adapter, rank=rank, device="cpu", **text)
            seconds = time.perf_counter() - start
        judged = measure.evaluate(
            work / method,
            options.text,
            reference=options.model,
            adapter=adapter,
            seq_len=options.seq_len,
            windows=options.windows,
            device="cpu",
        ).to_json()
        del judged["kl_histogram"]
        size = sum(p.stat().st_size for p in adapter.glob("*.safetensors")) if adapter else 0
        row = {
            "model": options.name or options.model.name,
            "method": method,
            "bits": options.bits,
            "group_size": options.group_size,
            "rank": rank,
            "adapter_bytes": size,
            "checkpoint_bytes": report["bytes"],
            "correct_seconds": seconds,
            **judged,
        }
        found.append(row)
        print(f"{row['model']} {method} rank {rank}: KL {row['kl']:.4f} +- {row['kl_stderr']:.4f}")
    return found


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    head = environment(options.threads)
    measured = []
    if options.out.is_file():
        measured = json.loads(options.out.read_text())["rows"]
    name = options.name or options.model.name
    with tempfile.TemporaryDirectory() as work:
        for method in options.methods:
            new = rows(options, method, Path(work))
            measured = [r for r in measured if (r["model"], r["method"]) != (name, method)] + new
    options.out.write_text(json.dumps({"environment": head, "rows": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
