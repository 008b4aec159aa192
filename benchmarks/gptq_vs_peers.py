"""llmq's GPTQ beside GPTQModel's and llm-compressor's: quality, time and memory in one run.

    python benchmarks/gptq_vs_peers.py MODEL --calibration TEXT --text TEXT --work FOLDER \
        --gptqmodel PYTHON --llmcompressor PYTHON

Each contender is a whole process (import, load, calibrate, solve, save), one after another with
the same threads and the very same calibration tokens; wall and CPU seconds and peak resident
memory come from the operating system (wait4). The results become plain float32 folders
(peers/dequantize.py) that one evaluator judges (peers/judge.py) without a line of llmq: KL to the
full model and perplexity. PYTHON is the interpreter of a peer's environment, see peers/README.md.

`--resume` keeps the contenders that an interrupted run with the same FOLDER has finished. Every row
says when it ran and how busy the machine was; on a busy one compare CPU seconds, not wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import environment

PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Contender:
    """One row: a quantizer with its settings, `options` as JSON (for llmq of its command line)."""

    name: str
    tool: str
    symmetric: bool
    options: str = "{}"


def contenders(symmetric: bool) -> list[Contender]:
    """llmq, and each peer with its defaults and with the setting that its authors call better."""
    return [
        Contender("llmq gptq", "llmq", symmetric, '{"method": "gptq"}'),
        Contender("gptqmodel default", "gptqmodel", symmetric),
        Contender("gptqmodel mse 2.4", "gptqmodel", symmetric, '{"mse": 2.4}'),
        Contender("llmcompressor default", "llmcompressor", symmetric),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--join", choices=["plain", "wikitext"], default="wikitext")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--llmq", default=sys.executable, help="interpreter that has llmq")
    parser.add_argument("--gptqmodel", help="interpreter that has GPTQModel")
    parser.add_argument("--llmcompressor", help="interpreter that has llm-compressor")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetry", nargs="+", choices=["sym", "asym"], default=["sym", "asym"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gptq_vs_peers.json"))
    return parser.parse_args()


def command(contender: Contender, args: argparse.Namespace, calib: Path, out: Path) -> list[str]:
    if contender.tool == "llmq":
        sizes = {"bits": args.bits, "group-size": args.group}
        sizes |= {"samples": args.samples, "seq-len": args.seq_len}
        sizes |= json.loads(contender.options)
        return [
            *(args.llmq, "-m", "llmq", "quantize", str(args.model), str(out)),
            *("--device", "cpu", "--no-bos", "--json"),
            "--symmetric" if contender.symmetric else "--asymmetric",
            *("--calibration", str(calib.with_suffix(".txt"))),
            *(f"--{key}" if value is True else f"--{key}={value}" for key, value in sizes.items()),
        ]
    [script] = PEERS.glob(f"{contender.tool}_*.py")
    return [
        *(getattr(args, contender.tool), str(script)),
        *(str(args.model), str(out), str(calib.with_suffix(".json"))),
        *(str(args.bits), str(args.group), str(int(contender.symmetric))),
        *("--options", contender.options, "--threads", str(args.threads)),
    ]


def timed(argv: list[str], threads: int, log: Path, cwd: Path) -> dict[str, Any]:
    """Run a process to its end; its own cost and the last JSON line that it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started, load = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), os.getloadavg()[0]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped it
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}\nfailed, see {log}")
    own = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return {
        "started": started,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "seconds_quantize": json.loads(own[-1]).get("seconds_quantize") if own else None,
        "commit": environment(threads)["commit"],
    }


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    )
    answer = subprocess.run(
        [python, "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return json.loads(answer.stdout)


def judge(rows: list[dict[str, Any]], plain: list[Path], args: argparse.Namespace) -> None:
    """Add quality to the rows, all in one process so that the full model runs once."""
    argv = [
        *(sys.executable, str(PEERS / "judge.py"), str(args.model), str(args.text)),
        *map(str, plain),
        *("--join", args.join, "--seq-len", str(args.eval_seq_len)),
        *("--windows", str(args.windows), "--threads", str(args.threads)),
    ]
    answer = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    for row, line in zip(rows, answer.stdout.splitlines(), strict=True):
        quality = json.loads(line)
        quality.pop("candidate")
        row.update(quality)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """llmq over the best of the peers, for each symmetry (below 1: llmq is better)."""
    result = []
    for symmetric in dict.fromkeys(row["symmetric"] for row in rows):
        ours = [r for r in rows if r["symmetric"] == symmetric and r["tool"] == "llmq"]
        peers = [r for r in rows if r["symmetric"] == symmetric and r["tool"] != "llmq"]
        if not ours or not peers:
            continue
        keys = ("kl", "seconds", "cpu_seconds", "peak_memory_bytes")
        best = {key: ours[0][key] / min(peer[key] for peer in peers) for key in keys}
        result.append({"symmetric": symmetric, **best})
    return result


def show(rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    heads = zip(
        ("KL", "+-", "ppl", "top-1", "wall s", "CPU s", "GiB"), (9, 9, 9, 8, 9, 9, 7), strict=True
    )
    print(" " * 30 + "".join(f"{text:>{width}}" for text, width in heads))
    for row in rows:
        print(
            f"{row['name']:<24}{'sym' if row['symmetric'] else 'asym':<6}{row['kl']:9.5f}"
            f"{row['kl_stderr']:9.5f}{row['perplexity']:9.3f}{row['top1']:8.4f}"
            f"{row['seconds']:9.1f}{row['cpu_seconds']:9.1f}"
            f"{row['peak_memory_bytes'] / 2**30:7.2f}"
        )
    for ratio in compared:
        print(
            f"{'llmq / best peer':<24}{'sym' if ratio['symmetric'] else 'asym':<6}"
            f"KL x{ratio['kl']:.2f}, wall x{ratio['seconds']:.2f}, "
            f"CPU x{ratio['cpu_seconds']:.2f}, memory x{ratio['peak_memory_bytes']:.2f}"
        )


def chosen(args: argparse.Namespace) -> list[Contender]:
    every = [c for name in args.symmetry for c in contenders(name == "sym")]
    every = [c for c in every if getattr(args, c.tool)]
    return [c for c in every if not args.only or any(part in c.name for part in args.only)]


def dequantize(model: Path, out: Path, plain: Path) -> None:
    """Make a plain folder of a checkpoint."""
    script = [str(PEERS / "dequantize.py"), str(model), str(out), str(plain)]
    subprocess.run([sys.executable, *script], check=True, stdout=subprocess.DEVNULL)


def run(contender: Contender, args: argparse.Namespace, calib: Path) -> tuple[dict[str, Any], Path]:
    """What one contender cost, and its result as a plain folder."""
    label = f"{contender.name} {'sym' if contender.symmetric else 'asym'}".replace(" ", "-")
    out, plain, done = (args.work / f"{label}{end}" for end in ("", "-plain", ".json"))
    argv = command(contender, args, calib, out)
    if args.resume and done.is_file():
        saved = json.loads(done.read_text())
        if saved["argv"] == argv:
            return saved["cost"], plain
    shutil.rmtree(out, ignore_errors=True)
    # Peers leave log folders where they run; llmq may be importable from here only.
    cwd = Path.cwd() if contender.tool == "llmq" else args.work
    cost = timed(argv, args.threads, args.work / f"{label}.log", cwd)
    done.write_text(json.dumps({"argv": argv, "cost": cost}))
    dequantize(args.model, out, plain)
    print(f"{label}: {cost['seconds']:.1f} s, CPU {cost['cpu_seconds']:.1f} s", flush=True)
    return cost, plain


def main() -> None:
    args = arguments()
    for name in ("model", "calibration", "text", "work"):
        setattr(args, name, getattr(args, name).absolute())
    for name in ("gptqmodel", "llmcompressor"):  # absolute, but never through the symbolic link
        setattr(args, name, getattr(args, name) and str(Path(getattr(args, name)).absolute()))
    args.work.mkdir(parents=True, exist_ok=True)
    calib = args.work / "calibration.json"
    sizes = (str(args.samples), str(args.seq_len))
    windows = [str(PEERS / "windows.py"), str(args.model), str(args.calibration), str(calib)]
    subprocess.run([sys.executable, *windows, *sizes], check=True)

    rows, plain = [], []
    for contender in chosen(args):
        cost, folder = run(contender, args, calib)
        rows.append({**vars(contender), **cost})
        plain.append(folder)
    judge(rows, plain, args)
    compared = ratios(rows)
    show(rows, compared)
    report = {
        "environment": environment(args.threads),
        "peers": {
            "gptqmodel": args.gptqmodel
            and versions(args.gptqmodel, ("gptqmodel", "torch", "transformers")),
            "llmcompressor": args.llmcompressor
            and versions(args.llmcompressor, ("llmcompressor", "torch", "transformers")),
        },
        "model": args.model.resolve().name,
        "bits": args.bits,
        "group_size": args.group,
        "calibration": f"{args.calibration.name}: {args.samples} x {args.seq_len} tokens",
        "rows": rows,
        "ratios": compared,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
