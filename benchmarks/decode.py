"""Tokens per second at batch 1 on a CPU: packed weights against the same model in bfloat16.

    python benchmarks/decode.py MODEL [--bits 4 --group-size 64 --threads 2]

Both models decode greedily through `generate` in one process, taking turns, in every setting:

    eager      dynamic cache
    static     static cache
    compiled   static cache and torch.compile

The packed model has its q, k, v and gate, up fused and its output head at `--head-bits`; the
result compares the best setting of each. Speed does not depend on the values of the codes, so
that rounding to nearest stands in for any method. Time runs from the second new token to the
last (the first belongs to the prompt); `cpu` divides by the processor time of the process
instead, which with one thread is steady even on a machine that does other work.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from llmq.fuse import fuse_shared_inputs, pack_head
from llmq.nn import PackedLinear, packed_modules, prepare
from llmq.scheme import QuantScheme

SETTINGS = ("eager", "static", "compiled")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--head-bits", type=int, choices=[4, 8, 16], default=8)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    return parser.parse_args()


class Clock(BaseStreamer):
    """Wall and processor time at every token."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def end(self) -> None:
        pass

    def rates(self) -> dict[str, float]:
        """Tokens per second; the first two entries are the prompt and the token it predicts."""
        count = len(self.wall) - 2
        return {
            "wall": count / (self.wall[-1] - self.wall[1]),
            "cpu": count / (self.cpu[-1] - self.cpu[1]),
        }


def packed_copy(dense: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    """The model as llmq decodes it."""
    model = copy.deepcopy(dense)
    scheme = QuantScheme(args.bits, args.group_size, not args.asymmetric)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, PackedLinear.from_linear(module, scheme))
    prepare(model)
    fuse_shared_inputs(model, input_ids=torch.zeros(1, 1, dtype=torch.long))
    if args.head_bits < 16:
        pack_head(model, QuantScheme(args.head_bits, args.group_size, symmetric=True))
    return model


def options(setting: str) -> dict[str, Any]:
    if setting == "eager":
        return {}
    if setting == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    config: Any = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # generate compiles on accelerators only, unless told so
    return {"cache_implementation": "static", "compile_config": config}


def decode(model: Any, setting: str, args: argparse.Namespace) -> dict[str, float]:
    """Rates of one greedy generation."""
    clock = Clock()
    prompt = torch.arange(1000, 1000 + args.prompt).unsqueeze(0)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=args.tokens,
        max_new_tokens=args.tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        **options(setting),
    )
    return clock.rates()


def measure(
    models: dict[str, PreTrainedModel], args: argparse.Namespace
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """setting -> model -> one entry per repetition, the models taking turns."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for setting in args.settings:
        started = time.perf_counter()
        for model in models.values():
            decode(model, setting, args)  # warm up, compile
        print(f"{setting}: warm after {time.perf_counter() - started:.0f} s", flush=True)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for _ in range(args.repeats):
            for name, model in models.items():
                rows[name].append(decode(model, setting, args))
        results[setting] = rows
        for name in models:
            wall, cpu = (median(rows[name], clock) for clock in ("wall", "cpu"))
            print(f"  {name:8} {wall:7.1f} tokens/s ({cpu:.1f} per processor second)", flush=True)
    return results


def median(rows: list[dict[str, float]], clock: str) -> float:
    return statistics.median(row[clock] for row in rows)


def best(results: dict[str, Any], name: str, clock: str) -> tuple[str, float]:
    rates = {setting: median(rows[name], clock) for setting, rows in results.items()}
    setting = max(rates, key=rates.__getitem__)
    return setting, rates[setting]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    packed = packed_copy(dense, args)
    layers = [module for _, module in packed_modules(packed) if isinstance(module, PackedLinear)]
    load = os.getloadavg()[0]
    results = measure({"bf16": dense, "packed": packed}, args)
    summary = {}
    for clock in ("wall", "cpu"):
        (dense_setting, dense_rate), (setting, rate) = (
            best(results, name, clock) for name in ("bf16", "packed")
        )
        summary[clock] = {
            "bf16": {"setting": dense_setting, "tokens_per_second": dense_rate},
            "packed": {"setting": setting, "tokens_per_second": rate},
            "ratio": rate / dense_rate,
        }
        print(f"{clock}: packed {rate:.1f} / bf16 {dense_rate:.1f} = {rate / dense_rate:.2f}x")
    record = {
        "environment": environment(args.threads),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "model": args.model.name,
        "scheme": {
            "bits": args.bits,
            "group_size": args.group_size,
            "symmetric": not args.asymmetric,
            "head_bits": args.head_bits,
        },
        "backends": sorted({layer.backend.name for layer in layers}),
        "prompt_tokens": args.prompt,
        "new_tokens": args.tokens,
        "summary": summary,
        "repetitions": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
