"""Integers beside code books at the same bits: KL to full precision, and bits per weight.

    python benchmarks/codebooks.py MODEL --calibration TEXT --text TEXT

Every row quantizes MODEL into a temporary folder and judges it on the same held-out windows. Rows
of schemes that are measured again are replaced in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment

from llmq import api, measure

INTEGERS: dict[str, Any] = {"group_size": 32, "symmetric": False}
NF4: dict[str, Any] = {"group_size": 32, "codebook": "nf4"}
LEARNED: dict[str, Any] = {"group_size": -1, "codebook": "learned"}
GROUPED: dict[str, Any] = {"group_size": 32, "codebook": "learned"}
SETTINGS = [
    (bits, method, scheme | outliers)
    for bits, schemes in (
        (4, (INTEGERS, NF4, LEARNED, GROUPED)),
        (3, (INTEGERS, LEARNED, GROUPED)),
        (2, (INTEGERS, LEARNED, GROUPED)),
    )
    for method in ("rtn", "gptq")
    for scheme in schemes
    for outliers in ([{}, {"outliers": 0.005}] if "codebook" in scheme else [{}])
]
KEYS = ("bits", "method", "codebook", "group_size", "outliers")
TAKEN = ("kl", "kl_stderr", "perplexity", "perplexity_stderr", "reference_perplexity", "protocol")


def row(options: argparse.Namespace, bits: int, method: str, scheme: dict[str, Any]) -> Any:
    """One setting, quantized and judged."""
    with tempfile.TemporaryDirectory() as work:
        report = api.quantize(
            options.model,
            Path(work) / "out",
            bits=bits,
            method=method,
            calibration=options.calibration,
            samples=options.samples,
            seq_len=256,
            skip=options.skip,
            device="cpu",
            **scheme,
        )
        judged = measure.evaluate(
            Path(work) / "out",
            options.text,
            reference=options.model,
            seq_len=256,
            windows=options.windows,
            device="cpu",
        ).to_json()
    made = {"bits": bits, "method": method, "codebook": None, "outliers": 0.0, **scheme}
    made |= {"bits_per_weight": report["bits_per_weight"], "seconds": report["seconds"]}
    return made | {key: judged[key] for key in TAKEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codebooks.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = {"environment": environment(1), "model": options.model.name, "skip": options.skip}
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for bits, method, scheme in SETTINGS:
        if bits in options.bits:
            new = row(options, bits, method, scheme)
            rows = [old for old in rows if any(old[key] != new[key] for key in KEYS)] + [new]
            print(json.dumps({k: v for k, v in new.items() if k != "protocol"}), flush=True)
            options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
