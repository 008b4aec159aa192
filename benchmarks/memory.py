"""Memory over time while a checkpoint is quantized: flat in the number of layers?

    python benchmarks/memory.py [--layers 8 16 --hidden 1024 --intermediate 3072 ...]
    python benchmarks/memory.py --wide [--hidden 2048 --intermediate 7168 ...]

A Llama of the given shape with random weights is written, block by block, and quantized by the
command line in a process of its own, whose memory is sampled: what it has for itself (anonymous)
and what it maps of files, which the system takes back when it needs room. The log of the run tells
when each block was finished. Per number of layers the result has the peak, the highest anonymous
memory within each block, and the slope of that over the blocks (of a line through all but the
first, if there are three) in percent of its mean per layer; and what `llmq plan` expected.

--wide takes the widths of a 70B model (8192 and 28672, 64 heads, 8 of them for keys and values), a
small vocabulary and one layer, quantized by GPTQ: does it fit into this machine? Sizes that are
given go before these.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from random_models import copy_tokenizer
from transformers import LlamaConfig

from llmq import shards

RESULTS = Path("benchmarks/results")
USUAL = {
    "layers": [8, 16],
    "hidden": 1024,
    "intermediate": 3072,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 4096,
    "seq_len": 256,
}
WIDE = {
    "layers": [1],
    "hidden": 8192,
    "intermediate": 28672,
    "heads": 64,
    "kv_heads": 8,
    "vocab": 8192,
    "seq_len": 512,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="the widths of a 70B model")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--activations", choices=["memory", "disk"], default="memory")
    parser.add_argument("--folder", type=Path, help="for checkpoints (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/memory[_wide].json")
    args = parser.parse_args()
    for name, value in (WIDE if args.wide else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or RESULTS / ("memory_wide.json" if args.wide else "memory.json")
    return args


def make_checkpoint(folder: Path, args: argparse.Namespace, layers: int) -> int:
    """Write a random Llama in bfloat16; bytes of one of its blocks."""
    D, F, head = args.hidden, args.intermediate, args.hidden // args.heads
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(2048, args.seq_len),
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    copy_tokenizer(folder)
    matrices = {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (args.kv_heads * head, D),
        "self_attn.v_proj": (args.kv_heads * head, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    torch.manual_seed(0)
    where: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> int:
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        shards.write(folder / name, tensors)
        where.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)

    nbytes = 0
    for i in range(layers):
        block = {f"model.layers.{i}.{n}.weight": random(*s) for n, s in matrices.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"model.layers.{i}.{norm}.weight"] = torch.ones(D, dtype=torch.bfloat16)
        nbytes = write(i, block)
    rest = {
        "model.embed_tokens.weight": random(args.vocab, D),
        "lm_head.weight": random(args.vocab, D),
    }
    write(layers, rest | {"model.norm.weight": torch.ones(D, dtype=torch.bfloat16)})
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return nbytes


def watch(command: list[str]) -> list[tuple[float, int, int]]:
    """Run a command; (Unix time, anonymous bytes, mapped bytes) every 50 ms."""
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                break
            kib = {line.split(":")[0]: line.split()[1] for line in lines if " kB" in line}
            if "RssAnon" in kib:
                anonymous, mapped = int(kib["RssAnon"]) * 1024, int(kib["RssFile"]) * 1024
                samples.append((time.time(), anonymous, mapped))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return samples


def measure(args: argparse.Namespace, layers: int, room: Path) -> dict[str, Any]:
    """One checkpoint of `layers` layers."""
    block = make_checkpoint(room / "model", args, layers)
    out = room / "out"
    options = {"method": args.method, "samples": args.samples, "seq-len": args.seq_len}
    options |= {"activations": args.activations, "device": "cpu"}
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    llmq = [sys.executable, "-W", "ignore", "-m", "llmq"]
    ahead = [*llmq, "plan", str(room / "model"), "--out", str(out), "--json", *flags]
    told = subprocess.run(ahead, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    planned = json.loads(told)["outlook"]
    print(json.dumps({"planned": planned}), flush=True)
    samples = watch([*llmq, "quantize", str(room / "model"), str(out), *flags])
    events = [json.loads(x) for x in (out / "quantization_log.jsonl").read_text().splitlines()]
    blocks = [event for event in events if event["event"] == "block"]
    ends = [datetime.datetime.fromisoformat(event["time"]).timestamp() for event in blocks]
    start = samples[0][0]
    highest = [
        max((anonymous for t, anonymous, _ in samples if a < t <= b), default=0)
        for a, b in zip([start, *ends[:-1]], ends, strict=True)
    ]
    later = highest[1:]
    slope = statistics.linear_regression(range(len(later)), later).slope if later[1:] else None
    stored = sum(path.stat().st_size for path in (room / "model").glob("*.safetensors"))
    shutil.rmtree(room / "model")
    shutil.rmtree(out)
    return {
        "layers": layers,
        "model_bytes": stored,
        "block_bytes": block,
        "activation_bytes": args.samples * args.seq_len * args.hidden * 2,
        "peak_anonymous_bytes": max(anonymous for _, anonymous, _ in samples),
        "peak_resident_bytes": max(anonymous + mapped for _, anonymous, mapped in samples),
        "highest_per_block_bytes": highest,
        "slope_bytes_per_layer": slope,
        "slope_percent_per_layer": slope and 100 * slope / statistics.mean(later),
        "planned": planned,
        "seconds_per_step": {
            step: round(sum(event["seconds"][step] for event in blocks), 3)
            for step in blocks[0]["seconds"]
        },
        "seconds": samples[-1][0] - start,
        "samples": [
            [round(t - start, 2), a, m] for t, a, m in samples[:: max(1, len(samples) // 300)]
        ],
        "begun": round(ends[0] - sum(blocks[0]["seconds"].values()) - start, 2),
        "block_ends": [round(end - start, 2) for end in ends],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory over time, one line per number of layers."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    for row in rows:
        times, anonymous, mapped = zip(*row["samples"], strict=True)
        [line] = axes.plot(times, [a / 2**20 for a in anonymous], label=f"{row['layers']} layers")
        total = [(a + m) / 2**20 for a, m in zip(anonymous, mapped, strict=True)]
        axes.plot(times, total, ":", color=line.get_color(), label="with mapped files")
        axes.vlines(row["block_ends"], 0, 20, color=line.get_color())
    axes.set(xlabel="seconds", ylabel="MiB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    args = arguments()
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as room:
            rows.append(measure(args, layers, Path(room)))
        shown = {k: v for k, v in rows[-1].items() if k not in ("samples", "block_ends")}
        print(json.dumps(shown))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "folder")}
    result = {"environment": environment(), "settings": settings, "runs": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
