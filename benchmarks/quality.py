"""llmq's ladder beside other quantizers at several widths: what each one loses, in one table.

    python benchmarks/quality.py MODEL --calibration TEXT --text TEXT TEXT --work FOLDER \
        --bits 4 3 2 --mixed 3.5 --group 32 --gptqmodel PYTHON --llmcompressor PYTHON \
        --autoround PYTHON

Every contender is a whole process that gets the same calibration tokens and writes a checkpoint of
the same bits and groups; peers/dequantize.py makes a plain folder of it, peers/judge.py measures
it in stock transformers on every text. See gptq_vs_peers.py, whose machinery this is, and
peers/README.md.

What is finished is kept in FOLDER, contender by contender and text by text: the same command goes
on after an interruption, and another text or contender costs only itself. `--only` picks
contenders by a part of their name. `--again` runs them again, as after a change of llmq.

Rows go into one JSON file; those of other models, texts and widths that are there already stay.
`--summary` prints what the whole file says (geometric means over models and texts, and the
ratios that llmq wants to hold), `--plot` draws it; neither needs another argument.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quality_report
from environment import environment
from gptq_vs_peers import PEERS, Contender, dequantize, judge, run, versions

RESULTS = Path("benchmarks/results/quality.json")
AT_ONCE = 4  # candidates in the judge's memory
DISTRIBUTIONS = {
    "gptqmodel": "gptqmodel",
    "llmcompressor": "llmcompressor",
    "autoround": "auto-round",
}
OWN = {
    "llmq rtn": {"method": "rtn"},
    "llmq gptq": {"method": "gptq"},
    "llmq fast": {"quality": "fast"},
    "llmq balanced": {"quality": "balanced"},
    "llmq best": {"quality": "best"},
}
# Each peer with its defaults, and with the settings that its authors call better.
PEER_SETTINGS = {
    "gptqmodel default": {},  # group-aware order
    "gptqmodel mse": {"mse": 2.4},
    "gptqmodel act-order mse": {"mse": 2.4, "desc_act": True, "act_group_aware": False},
    "llmcompressor default": {},  # act-order with static groups
    "llmcompressor mse": {"weights": {"observer": "mse"}},
    "llmcompressor weight-order mse": {"actorder": "weight", "weights": {"observer": "mse"}},
    "autoround 200": {},
}


def contenders(symmetric: bool) -> list[Contender]:
    """llmq's rungs, and the peers."""
    both = {**OWN, **PEER_SETTINGS}
    return [Contender(n, n.split()[0], symmetric, json.dumps(o)) for n, o in both.items()]


def mixed(average: float, symmetric: bool) -> list[Contender]:
    """llmq with widths of its own for every layer."""
    options = {"bits": average, "mixed": True}
    return [
        Contender(f"{name} mixed", "llmq", symmetric, json.dumps({**OWN[name], **options}))
        for name in ("llmq balanced", "llmq best")
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--name", help="of the model in the table (default: its folder's)")
    parser.add_argument(
        "--join", choices=["plain", "wikitext"], nargs="+", default=["plain"], help="per text"
    )
    parser.add_argument("--work", type=Path, help="folder for the checkpoints")
    parser.add_argument("--llmq", default=sys.executable, help="interpreter that has llmq")
    parser.add_argument("--gptqmodel", help="interpreter that has GPTQModel")
    parser.add_argument("--llmcompressor", help="interpreter that has llm-compressor")
    parser.add_argument("--autoround", help="interpreter that has AutoRound")
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="forget what FOLDER holds of these")
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--mixed", nargs="*", type=float, default=[], help="averages of bits")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--eval-seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="only print what --out says")
    parser.add_argument("--plot", action="store_true", help="only draw what --out holds")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> Iterator[tuple[float, list[Contender]]]:
    """(average of bits, contenders) to measure together."""
    for average, every in [
        *((bits, contenders(args.symmetric)) for bits in args.bits),
        *((bits, mixed(bits, args.symmetric)) for bits in args.mixed),
    ]:
        able = [c for c in every if getattr(args, c.tool)]
        chosen = [c for c in able if not args.only or any(part in c.name for part in args.only)]
        yield average, chosen


def measure(
    average: float, chosen: list[Contender], args: argparse.Namespace, calib: Path
) -> Iterator[dict[str, Any]]:
    """The rows of one width, a few contenders at a time."""
    local = copy.copy(args)
    local.bits, local.resume = int(average), not args.again  # mixed widths are among the options
    local.work = args.work / f"{average:g}bit-g{args.group}"
    local.work.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(chosen), AT_ONCE):
        rows, plain = [], []
        for contender in chosen[start : start + AT_ONCE]:
            try:
                cost, folder = run(contender, local, calib)
            except (SystemExit, subprocess.CalledProcessError) as error:
                print(f"{contender.name} at {average:g} bits: no result: {error}", flush=True)
                continue
            row = {**vars(contender), "bits": average, "group_size": args.group, **cost}
            if contender.tool == "llmq":
                report = folder.with_name(folder.name.removesuffix("-plain"))
                report /= "quantization_report.json"
                row["predicted_kl"] = json.loads(report.read_text())["predicted_kl"]
            rows.append(row)
            plain.append(folder)
        for text, join in zip(args.text, args.join, strict=True) if rows else ():
            local.text, local.join = text, join
            yield from judged(rows, plain, local)
        for folder in plain:  # they are large, and easily made again
            shutil.rmtree(folder, ignore_errors=True)


def judged(
    rows: list[dict[str, Any]], plain: list[Path], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """`rows` with what the judge says about their folders, from the cache where it is there."""
    asked = [args.text.name, args.join, args.windows, args.eval_seq_len, args.text.stat().st_size]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    found: list[dict[str, Any]] = []
    missing: list[tuple[dict[str, Any], Path]] = []
    for row, folder in zip(rows, plain, strict=True):
        cache = folder.with_name(f"{folder.name}-{key}.json")
        saved = json.loads(cache.read_text()) if cache.is_file() else {}
        if saved.get("started") == row["started"]:
            found.append({**row, **saved})
            continue
        if not folder.is_dir():
            dequantize(args.model, folder.with_name(folder.name.removesuffix("-plain")), folder)
        missing.append(({**row}, folder))
    if missing:
        new, folders = [row for row, _ in missing], [folder for _, folder in missing]
        before = [set(row) for row in new]
        judge(new, folders, args)
        for row, folder, known in zip(new, folders, before, strict=True):
            said = {k: v for k, v in row.items() if k not in known}
            cache = folder.with_name(f"{folder.name}-{key}.json")
            cache.write_text(json.dumps({"started": row["started"], **said}))
        found += new
    return found


def store(rows: list[dict[str, Any]], path: Path, head: dict[str, Any]) -> None:
    """Replace rows of the same contender, model, texts and format; keep all others."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    keys = ("model", "calibration", "text", "name", "symmetric", "bits", "group_size")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in data["rows"] if tuple(row[key] for key in keys) not in new]
    peers = {**data.get("peers", {}), **head["peers"]}
    every = kept + rows
    data = {**data, **head, "peers": peers, "summary": quality_report.summary(every), "rows": every}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    args = arguments()
    if args.plot or args.summary:
        rows = json.loads(args.out.read_text())["rows"]
        if args.plot:
            quality_report.plot(rows, args.out.with_suffix(".svg"))
        if args.summary:
            quality_report.show(quality_report.summary(rows))
        return
    name = args.name or args.model.resolve().name
    args.join = args.join * len(args.text) if len(args.join) == 1 else args.join
    args.text = [path.absolute() for path in args.text]
    for key in ("model", "calibration", "work"):
        setattr(args, key, getattr(args, key).absolute())
    for key in DISTRIBUTIONS:  # absolute, but never through the symbolic link
        setattr(args, key, getattr(args, key) and str(Path(getattr(args, key)).absolute()))
    args.work.mkdir(parents=True, exist_ok=True)
    sizes = (str(args.samples), str(args.seq_len))
    calib = args.work / f"calibration-{'x'.join(sizes)}.json"
    windows = [str(PEERS / "windows.py"), str(args.model), str(args.calibration), str(calib)]
    subprocess.run([sys.executable, *windows, *sizes], check=True)
    peers = {
        tool: versions(getattr(args, tool), (distribution, "torch", "transformers"))
        for tool, distribution in DISTRIBUTIONS.items()
        if getattr(args, tool)
    }
    head: dict[str, Any] = {"environment": environment(args.threads), "peers": peers}
    calibration = f"{args.calibration.name}: {args.samples} x {args.seq_len} tokens"
    for average, chosen in settings(args):
        for row in measure(average, chosen, args, calib):
            row = {"model": name, "calibration": calibration, **row}
            store([row], args.out, head)
            print(quality_report.line(row), flush=True)


if __name__ == "__main__":
    main()
