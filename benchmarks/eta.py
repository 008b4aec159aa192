"""Is the time that is left right? What was predicted behind every block, and what remained.

    python benchmarks/eta.py [--only llama gemma] [--add] [--out benchmarks/results/eta.json]
    python benchmarks/eta.py --tiny          # does it run?

Random models are quantized by the command line, one thread, each in a process of its own. The log
in the output folder tells when each block was finished; `progress.Pace`, which the live line asks,
is given these times one after the other. A row has, behind every block, what Pace then said and
what really remained until the last block and until the end of the run. The bar is an error of at
most 15 % from a tenth of the blocks on (the second, if that is more). Other programs on the machine
disturb it: they slow down one half of a run and not the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from environment import environment
from random_models import write_model
from transformers import AutoConfig

from llmq.progress import Pace

WITHIN = 0.15
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}
RUNS: dict[str, dict[str, Any]] = {
    "llama": {"type": "llama", "layers": 32, "options": ["--method", "gptq"]},
    "gemma": {"type": "gemma2", "layers": 20, "options": ["--quality", "balanced"]},
    "experts": {"type": "qwen3_moe", "layers": 20, "options": ["--method", "gptq"]},
    "disk": {
        "type": "qwen3",
        "layers": 20,
        "options": ["--quality", "fast", "--activations", "disk"],
    },
}


def judged(begun: float, ends: Sequence[float], end: float) -> list[dict[str, float]]:
    """Per finished block but the last: what `Pace` says, and what really remained.

    Args:
        begun: when work on the first block began.
        ends: when each block was finished, in seconds since the run began.
        end: when the run was.
    """
    pace, rows = Pace(begun, len(ends)), []
    for done, now in enumerate(ends[:-1], 1):
        pace.note(now, done)
        predicted = pace.remaining()
        assert predicted is not None
        left = ends[-1] - now
        rows.append(
            {
                "done": done,
                "predicted": round(predicted, 3),
                "remained": round(left, 3),
                "error": predicted / left - 1,
                "error_of_the_run": predicted / (end - now) - 1,
            }
        )
    return rows


def tenth(blocks: int) -> int:
    """How many blocks are finished when the prediction must be right."""
    return max(2, math.ceil(blocks / 10))


def measure(name: str, tiny: bool, room: Path) -> dict[str, Any]:
    """One run."""
    run = RUNS[name]
    sizes = SIZES | (EXPERTS if run["type"] == "qwen3_moe" else {})
    if tiny:
        sizes |= {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 4096}
    layers = 4 if tiny else run["layers"]
    config = AutoConfig.for_model(
        run["type"],
        num_hidden_layers=layers,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        **sizes,
    )
    write_model(config, room / "model")
    text = ["--samples", "12" if tiny else "64", "--seq-len", "64" if tiny else "256"]
    options = [*run["options"], *text, "--group-size", "64", "--device", "cpu"]
    command = ["-m", "llmq", "quantize", str(room / "model"), str(room / "out"), *options]
    subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = (room / "out" / "quantization_log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    blocks = [(t - times[0], e) for t, e in zip(times, events, strict=True) if "block" in e]
    ends = [end for end, _ in blocks]
    begun = ends[0] - sum(blocks[0][1]["seconds"].values())
    rows = judged(begun, ends, times[-1] - times[0])
    from_then_on = [row for row in rows if row["done"] >= tenth(layers)]
    first = from_then_on[0]
    return {
        "name": name,
        "layers": layers,
        "options": options,
        "seconds": times[-1] - times[0],
        "begun": round(begun, 3),
        "block_ends": [round(end, 3) for end in ends],
        "after_a_tenth": first,
        "good": abs(first["error"]) <= WITHIN,
        "largest_error_after": max(abs(row["error"]) for row in from_then_on),
        "blocks": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--tiny", action="store_true", help="narrow blocks, few of them")
    parser.add_argument("--add", action="store_true", help="keep the rows that are there already")
    parser.add_argument("--folder", type=Path, help="for models (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/eta.json")
    args = parser.parse_args()
    target = args.out or (None if args.tiny else Path("benchmarks/results/eta.json"))
    kept = []
    if args.add and target and target.is_file():
        kept = [
            row for row in json.loads(target.read_text())["rows"] if row["name"] not in args.only
        ]
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as room:
            kept.append(measure(name, args.tiny, Path(room)))
        print(json.dumps({k: v for k, v in kept[-1].items() if k not in ("blocks", "block_ends")}))
        result = {"environment": environment(1), "within": WITHIN, "rows": kept}
        if target:
            target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
