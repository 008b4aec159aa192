"""How long does quantizing a large model take? A few of its blocks, at full width.

    python benchmarks/quantize_time.py --shape llama-3.1-8b qwen3-30b-a3b [--method gptq]
    python benchmarks/quantize_time.py --tiny          # does it run? seconds on a CPU

A model with the widths of the named one, random weights and only `--layers` blocks is written and
quantized by the command line in a process of its own. The log of that run tells how long each
block took; the whole model is reckoned from the blocks after the first, what happens once, and
what a block costs times the blocks that the model really has. The result also holds what
`llmq plan` expected. Fits into ten minutes on one large GPU with the defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from random_models import write_model
from transformers import AutoConfig

# Sizes from the models' own config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--quality", help="instead of a method: fast, balanced")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks, little text")
    parser.add_argument("--folder", type=Path, help="for checkpoints (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quantize_time.json")
    args = parser.parse_args()
    if args.tiny:
        args.samples, args.seq_len = 8, 64
    return args


def made(name: str, args: argparse.Namespace, folder: Path) -> int:
    """Write the model; how many blocks the real one has."""
    sizes = dict(SHAPES[name])
    kind, blocks = sizes.pop("model_type"), sizes["num_hidden_layers"]
    sizes["num_hidden_layers"] = args.layers
    if args.tiny:
        sizes |= {key: value for key, value in TINY.items() if key in sizes}
    config = AutoConfig.for_model(
        kind,
        max_position_embeddings=max(2048, args.seq_len),
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        **sizes,
    )
    write_model(config, folder, args.device)
    return blocks


def call(command: list[str]) -> str:
    """Run `llmq ...`; its standard output."""
    whole = [sys.executable, "-W", "ignore", "-m", "llmq", *command]
    return subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(name: str, args: argparse.Namespace, room: Path) -> dict[str, Any]:
    """One shape."""
    source, out = room / "model", room / "out"
    blocks = made(name, args, source)
    effort = ["--quality", args.quality] if args.quality else ["--method", args.method]
    options = [*effort, "--bits", args.bits, "--samples", str(args.samples)]
    options += ["--seq-len", str(args.seq_len), "--device", args.device]
    planned = json.loads(
        call(["plan", str(source), *options, "--out", str(out), "--json"]).splitlines()[-1]
    )
    begin = time.perf_counter()
    report = json.loads(
        call(["quantize", str(source), str(out), *options, "--json"]).splitlines()[-1]
    )
    seconds = time.perf_counter() - begin
    events = [json.loads(x) for x in (out / "quantization_log.jsonl").read_text().splitlines()]
    steps = [event["seconds"] for event in events if event["event"] == "block"]
    later = steps[1:] or steps
    per_block = {key: statistics.mean(step[key] for step in later) for key in later[0]}
    once = seconds - sum(sum(step.values()) for step in steps)
    return {
        "shape": name,
        "layers": args.layers,
        "seconds": seconds,
        "seconds_per_block": per_block,
        "seconds_once": once,
        "blocks_of_the_model": blocks,
        "reckoned_seconds_of_the_model": once + blocks * sum(per_block.values()),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "planned": planned["outlook"],
    }


def main() -> None:
    args = arguments()
    rows = []
    for name in args.shape:
        with tempfile.TemporaryDirectory(dir=args.folder) as room:
            rows.append(measure(name, args, Path(room)))
        print(json.dumps(rows[-1]), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "folder")}
    hardware = environment(torch.get_num_threads())
    if args.device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(args.device)
    result = {"environment": hardware, "settings": settings, "rows": rows}
    default = None if args.tiny else Path("benchmarks/results/quantize_time.json")
    if target := args.out or default:
        target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
