"""llmq's ladder beside other quantizers at several widths: what each one loses, in one table.

    python benchmarks/quality.py MODEL --calibration TEXT --text TEXT --work FOLDER --bits 4 3 2 \
        --group 32 --gptqmodel PYTHON --llmcompressor PYTHON

Every contender is a whole process that gets the same calibration tokens and writes a checkpoint of
the same bits and groups; peers/dequantize.py makes a plain folder of it, peers/judge.py measures
it in stock transformers. See gptq_vs_peers.py, whose machinery this is, and peers/README.md.

Rows go into one JSON file; those of other models and widths that are there already stay. The plot
(`--plot`, no other argument needed) shows KL against the bits stored per weight.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import environment
from gptq_vs_peers import PEERS, Contender, judge, run, versions

RESULTS = Path("benchmarks/results/quality.json")
GREY = "#7f8790"
STYLES = {
    "llmq balanced": ("llmq balanced", "#2e9e6b", "o"),
    "llmq fast": ("llmq fast", "#2f7fd6", "o"),
    "llmq gptq": ("llmq gptq", "#8fbbe8", "o"),
    "llmq balanced mixed": ("llmq balanced, mixed widths", "#7a4fc9", "D"),
    "gptqmodel": ("GPTQModel, best of its settings", "#d98a1f", "^"),
    "llmcompressor": ("llm-compressor, best of its settings", "#c2506b", "s"),
}


def contenders(symmetric: bool, mixed: float | None) -> list[Contender]:
    """llmq's rungs; each peer with its defaults and with the settings that may do better."""
    if mixed is not None:
        options = json.dumps({"quality": "balanced", "bits": mixed})
        return [Contender("llmq balanced mixed", "llmq", symmetric, options)]
    return [
        Contender("llmq gptq", "llmq", symmetric, '{"method": "gptq"}'),
        Contender("llmq fast", "llmq", symmetric, '{"quality": "fast"}'),
        Contender("llmq balanced", "llmq", symmetric, '{"quality": "balanced"}'),
        Contender("gptqmodel default", "gptqmodel", symmetric),
        Contender("gptqmodel mse", "gptqmodel", symmetric, '{"mse": 2.4}'),
        Contender(
            "gptqmodel act-order mse",
            "gptqmodel",
            symmetric,
            '{"mse": 2.4, "desc_act": true, "act_group_aware": false}',
        ),
        Contender("llmcompressor default", "llmcompressor", symmetric),
        Contender(
            "llmcompressor mse",
            "llmcompressor",
            symmetric,
            '{"weights": {"observer": "mse"}}',
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--name", help="of the model in the table (default: its folder's)")
    parser.add_argument("--join", choices=["plain", "wikitext"], default="plain")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints")
    parser.add_argument("--llmq", default=sys.executable, help="interpreter that has llmq")
    parser.add_argument("--gptqmodel", help="interpreter that has GPTQModel")
    parser.add_argument("--llmcompressor", help="interpreter that has llm-compressor")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--eval-seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="only draw what --out holds")
    return parser.parse_args()


def measure(width: float, args: argparse.Namespace, calib: Path) -> list[dict[str, Any]]:
    """The rows of one width; a fractional one is llmq's average."""
    mixed = None if width == int(width) else width
    args.bits = math.ceil(width)
    every = [c for c in contenders(args.symmetric, mixed) if getattr(args, c.tool)]
    chosen = [c for c in every if not args.only or any(part in c.name for part in args.only)]
    root, rows, plain = args.work, [], []
    args.work = root / f"{width:g}bit-g{args.group}"
    args.work.mkdir(parents=True, exist_ok=True)
    for contender in chosen:
        cost, folder = run(contender, args, calib)
        rows.append({**vars(contender), "bits": width, "group_size": args.group, **cost})
        plain.append(folder)
    judge(rows, plain, args)
    args.work = root
    return rows


def store(rows: list[dict[str, Any]], path: Path, head: dict[str, Any]) -> None:
    """Replace rows of the same contender, model and format; keep all others."""
    data = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    keys = ("model", "text", "name", "symmetric", "bits", "group_size")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in data["rows"] if tuple(row[key] for key in keys) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**data, **head, "rows": kept + rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['model']:<14}{row['bits']:<4g}{row['name']:<26}KL {row['kl']:8.5f} +- "
            f"{row['kl_stderr']:.5f}  ppl {row['perplexity']:8.3f}  top-1 {row['top1']:.4f}  "
            f"wall {row['seconds']:6.1f} s  CPU {row['cpu_seconds']:6.1f} s"
        )
    for bits in dict.fromkeys(row["bits"] for row in rows):
        kl = {row["name"]: row["kl"] for row in rows if row["bits"] == bits}
        peers = [value for name, value in kl.items() if not name.startswith("llmq")]
        for name, value in kl.items():
            if peers and name.startswith("llmq"):
                print(f"{bits:g} bits, {name} / best peer: KL x{value / min(peers):.2f}")


def points(rows: list[dict[str, Any]], style: str) -> list[tuple[float, float, float]]:
    """(bits, KL, its error) of one line; for a peer the best of its settings."""
    best: dict[float, tuple[float, float, float]] = {}
    for row in rows:
        same = row["name"] == style or row["name"].split()[0] == style
        if same and (row["bits"] not in best or row["kl"] < best[row["bits"]][1]):
            best[row["bits"]] = (row["bits"], row["kl"], row["kl_stderr"])
    return sorted(best.values())


def plot(path: Path) -> None:
    """One panel per model and format; readable on light and on dark pages."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    panels = list(dict.fromkeys((r["model"], r["group_size"], r["symmetric"]) for r in rows))
    plt.rcParams["svg.hashsalt"] = "llmq"  # the same table gives the same file
    plt.rcParams["svg.fonttype"] = "none"
    figure, grid = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        own = [r for r in rows if (r["model"], r["group_size"], r["symmetric"]) == panel]
        for style, (label, colour, marker) in STYLES.items():
            if found := points(own, style):
                x, y, error = (list(column) for column in zip(*found, strict=True))
                looks = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3}
                axes.errorbar(x, y, yerr=error, label=label, **looks)
        axes.set_yscale("log")
        name, group, symmetric = panel
        kind = "symmetric" if symmetric else "asymmetric"
        axes.set_title(f"{name}, g{group} {kind}", color=GREY, fontsize=11)
        axes.set_xlabel("bits per code (average)", color=GREY)
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axes.tick_params(colors=GREY, which="both")
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_color(GREY)
    grid[0][0].set_ylabel("KL(full || quantized), nats per token", color=GREY)
    grid[0][0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    figure.savefig(path.with_suffix(".svg"), transparent=True, metadata={"Date": None})


def main() -> None:
    args = arguments()
    if args.plot:
        plot(args.out)
        return
    name = args.name or args.model.resolve().name
    for key in ("model", "calibration", "text", "work"):
        setattr(args, key, getattr(args, key).absolute())
    for key in ("gptqmodel", "llmcompressor"):  # absolute, but never through the symbolic link
        setattr(args, key, getattr(args, key) and str(Path(getattr(args, key)).absolute()))
    args.work.mkdir(parents=True, exist_ok=True)
    calib = args.work / "calibration.json"
    sizes = (str(args.samples), str(args.seq_len))
    windows = [str(PEERS / "windows.py"), str(args.model), str(args.calibration), str(calib)]
    subprocess.run([sys.executable, *windows, *sizes], check=True)
    peers = {
        tool: versions(getattr(args, tool), (tool, "torch", "transformers"))
        for tool in ("gptqmodel", "llmcompressor")
        if getattr(args, tool)
    }
    head = {"environment": environment(args.threads), **({"peers": peers} if peers else {})}
    calibration = f"{args.calibration.name}: {args.samples} x {args.seq_len} tokens"
    for width in args.bits.copy():
        rows = measure(width, args, calib)
        rows = [{"model": name, "calibration": calibration, **row} for row in rows]
        store(rows, args.out, head)
        show(rows)


if __name__ == "__main__":
    main()
