"""Does `llmq plan` know what a run takes? Planned against measured, in 22 configurations.

    python benchmarks/plan_grid.py [--only 3 7] [--add] [--out benchmarks/results/plan_grid.json]

Random models of different width, depth, vocabulary and architecture are written one after the
other, planned and quantized, each in a process of its own, whose peak memory the system tells
(wait4). A row has what was planned, what was measured, and planned over measured; for the time
that is seconds of the processor, since one thread ran and other programs may have, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

WITHIN = 0.15
# Sizes per model, options per run; heads are 64 wide.
MODELS: dict[str, dict[str, Any]] = {
    "narrow": {"type": "llama", "width": 512, "inner": 1408, "layers": 3, "vocabulary": 8192},
    "middle": {"type": "llama", "width": 1024, "inner": 2816, "layers": 1, "vocabulary": 16384},
    "deep": {"type": "llama", "width": 384, "inner": 1024, "layers": 4, "vocabulary": 4096},
    "wide": {"type": "llama", "width": 1024, "inner": 4096, "layers": 1, "vocabulary": 8192},
    "wider": {"type": "llama", "width": 2048, "inner": 5632, "layers": 1, "vocabulary": 8192},
    "words": {"type": "qwen3", "width": 512, "inner": 1408, "layers": 1, "vocabulary": 131072},
    "float32": {"type": "opt", "width": 768, "inner": 3072, "layers": 1, "vocabulary": 16384},
    "conv1d": {"type": "gpt2", "width": 768, "inner": 3072, "layers": 1, "vocabulary": 16384},
    "windows": {"type": "gemma2", "width": 768, "inner": 2304, "layers": 2, "vocabulary": 32768},
    "experts": {
        "type": "qwen3_moe",
        "width": 512,
        "inner": 256,
        "layers": 1,
        "vocabulary": 16384,
        "experts": 24,
    },
    "mixture": {
        "type": "mixtral",
        "width": 768,
        "inner": 1536,
        "layers": 1,
        "vocabulary": 8192,
        "experts": 4,
    },
}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("narrow", {"method": "gptq", "samples": 16, "seq_len": 128}),
    ("narrow", {"method": "gptq", "samples": 16, "seq_len": 512, "activations": "disk"}),
    ("middle", {"method": "gptq", "samples": 8, "seq_len": 128}),
    ("middle", {"quality": "balanced", "samples": 8, "seq_len": 64}),
    ("middle", {"method": "rtn", "bits": 8, "seq_len": 64}),
    ("middle", {"method": "awq", "samples": 8, "seq_len": 64}),
    ("deep", {"quality": "fast", "samples": 8, "seq_len": 64, "bits": 2}),
    ("deep", {"method": "gptq", "samples": 40, "seq_len": 512, "group_size": 64}),
    ("wide", {"quality": "fast", "samples": 8, "seq_len": 64, "bits": 3}),
    ("wide", {"quality": "balanced", "samples": 8, "seq_len": 64, "group_size": 32}),
    ("wide", {"method": "awq+gptq", "samples": 8, "seq_len": 64, "symmetric": False}),
    ("wider", {"method": "rtn", "samples": 8, "seq_len": 64}),
    ("wider", {"method": "gptq", "samples": 6, "seq_len": 64, "group_size": -1}),
    ("words", {"method": "gptq", "samples": 8, "seq_len": 256}),
    ("words", {"method": "rtn", "samples": 8, "seq_len": 64, "lm_head": True}),
    ("float32", {"method": "gptq", "samples": 16, "seq_len": 64, "bits": 2}),
    ("conv1d", {"quality": "fast", "samples": 8, "seq_len": 64}),
    ("windows", {"quality": "balanced", "samples": 8, "seq_len": 128}),
    ("experts", {"method": "gptq", "samples": 16, "seq_len": 128}),
    ("mixture", {"quality": "fast", "samples": 8, "seq_len": 64}),
    ("deep", {"quality": "balanced", "samples": 16, "seq_len": 128, "bits": 2}),
    ("words", {"method": "gptq", "samples": 8, "seq_len": 256, "bits": 3.5}),
]


def config(sizes: dict[str, Any]) -> Any:
    """A configuration of transformers; each reads the names that it knows."""
    heads = sizes["width"] // 64
    given = {"hidden_size": sizes["width"], "intermediate_size": sizes["inner"]}
    given |= {"num_hidden_layers": sizes["layers"], "num_attention_heads": heads}
    if sizes["type"] == "gpt2":
        given = {"n_embd": sizes["width"], "n_inner": sizes["inner"], "n_layer": sizes["layers"]}
        given |= {"n_head": heads}
    elif sizes["type"] == "opt":
        given |= {"ffn_dim": sizes["inner"], "word_embed_proj_dim": sizes["width"]}
    else:
        given |= {"num_key_value_heads": heads // 2, "head_dim": 64}
    if "experts" in sizes:
        experts = "num_local_experts" if sizes["type"] == "mixtral" else "num_experts"
        given |= {experts: sizes["experts"], "moe_intermediate_size": sizes["inner"]}
    dtype = "float32" if sizes["type"] == "opt" else "bfloat16"
    return AutoConfig.for_model(
        sizes["type"],
        vocab_size=sizes["vocabulary"],
        max_position_embeddings=512,
        tie_word_embeddings=sizes["type"] == "gemma2",
        bos_token_id=0,
        eos_token_id=1,
        dtype=dtype,
        **given,
    )


def child(source: str, out: str, options: dict[str, Any]) -> None:
    """Plan, then quantize; prints what was planned, and seconds."""
    from llmq import api
    from llmq.cli_common import start

    start(True)
    begin = time.perf_counter()
    found = api.plan(source, device="cpu", out=out, **options)
    planned = time.perf_counter() - begin
    tokens = options.get("samples", 8) * (options.get("seq_len") or 512)
    high = 1000
    ids = torch.randint(2, high, (tokens * 2,), generator=torch.Generator().manual_seed(0))
    options.pop("out", None)
    api.quantize(source, out, device="cpu", calibration=ids, **options)
    seconds = time.perf_counter() - begin
    assert found.outlook
    outlook = {**vars(found.outlook)}
    print(json.dumps({"planned": outlook, "planning_seconds": planned, "seconds": seconds}))


def measure(name: str, options: dict[str, Any], source: Path, room: Path) -> dict[str, Any]:
    """One row."""
    out = room / "out"
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(source), str(out)]
    begin = time.perf_counter()
    with subprocess.Popen([*command, json.dumps(options)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode:
        raise SystemExit(f"{name} {options}: status {process.returncode}")
    row = json.loads(told.splitlines()[-1])
    peak = usage.ru_maxrss * 1024
    return {
        "model": name,
        "options": options,
        "planned_bytes": row["planned"]["memory_bytes"],
        "measured_bytes": peak,
        "memory_ratio": row["planned"]["memory_bytes"] / peak,
        "phase": row["planned"]["phase"],
        "planned_seconds": row["planned"]["seconds"],
        "measured_seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "time_ratio": row["planned"]["seconds"] / (usage.ru_utime + usage.ru_stime),
        "planning_seconds": row["planning_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of runs, from 0")
    parser.add_argument("--add", action="store_true", help="keep the rows that are there already")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_grid.json"))
    args = parser.parse_args()
    if args.child:
        source, out, options = args.child
        child(source, out, json.loads(options))
        return
    head = {"environment": environment(torch.get_num_threads()), "within": WITHIN}
    found = json.loads(args.out.read_text())["rows"] if args.add and args.out.is_file() else []
    rows = {row["number"]: row for row in found}
    with tempfile.TemporaryDirectory() as room:
        for number, (name, options) in enumerate(RUNS):
            if number in rows or (args.only and number not in args.only):
                continue
            source = Path(room) / name
            if not source.is_dir():
                write_model(config(MODELS[name]), source)
            rows[number] = {"number": number, **measure(name, options, source, Path(room))}
            print(json.dumps(rows[number]), flush=True)
            ordered = [rows[n] for n in sorted(rows)]
            good = sum(abs(row["memory_ratio"] - 1) <= WITHIN for row in ordered)
            result = {**head, "good": good, "runs": len(rows), "models": MODELS, "rows": ordered}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    good = sum(abs(row["memory_ratio"] - 1) <= WITHIN for row in rows.values())
    print(f"memory within {WITHIN:.0%} in {good} of {len(rows)}")


if __name__ == "__main__":
    main()
