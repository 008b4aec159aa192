"""Tables of what on_gpu.py measured, in Markdown, from its JSON.

    python benchmarks/kernels.py benchmarks/results/gpu_NAME.json

Checks that failed, times beside the dense product of the same run, chains, whole models, and the
aims of KERNELS (batch 1 on large layers at least 3.0x the dense product, and so on): met or not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DISTANT = 0.2  # from the exact product; peers that round the matrix again stay below
LARGE = 30e6  # bytes of packed weight from which a layer counts as large


class Aim(NamedTuple):
    """A ratio to the dense product that every large layer should reach at `rows` rows."""

    rows: int
    ratio: float


AIMS = (Aim(1, 3.0), Aim(16, 2.9), Aim(64, 1.9), Aim(256, 0.85), Aim(2048, 0.9))
AIM_DECODE = 450  # tokens per second at batch 1, Llama-3.1-8B shape, on an H200

Rows = Sequence[dict[str, Any]]


def of_kind(rows: Rows, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind that hold a result."""
    return [row for row in rows if row["kind"] == kind and "error" not in row]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; empty without lines."""
    if not lines:
        return ""
    rule = "|" + "---|" * len(heads)
    return "\n".join(
        ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(x) + " |" for x in lines)]
    )


def format_of(row: dict[str, Any]) -> tuple[str, int, bool]:
    """What a timed weight was stored in."""
    return row["dtype"], row["group"], row["symmetric"]


MAIN = ("bfloat16", 128, True)  # the format that the aims are about


def times(rows: Rows, stored: tuple[str, int, bool]) -> str:
    """Ratio to the dense product by shape, contender and rows of x; ours with its share of roof."""
    found = [r for r in of_kind(rows, "time") if format_of(r) == stored]
    batches = sorted({r["M"] for r in found})
    lines = []
    for N, K in dict.fromkeys((r["N"], r["K"]) for r in found):
        here = [r for r in found if (r["N"], r["K"]) == (N, K)]
        for name in dict.fromkeys(r["name"] for r in here):
            cells = {r["M"]: cell(r) for r in here if r["name"] == name}
            lines.append([f"{N} x {K}", name, *(cells.get(M, "") for M in batches)])
    return markdown(["N x K", "", *(f"M={M}" for M in batches)], lines)


def cell(row: dict[str, Any]) -> str:
    """ "8.1 us" for the dense product, "3.20x" for others, "3.20x 88%" for ours."""
    if row["name"] == "dense":
        return f"{row['us']:.1f} us"
    roof = f" {row['of_roof']:.0%}" if "of_roof" in row else ""
    return f"{row['over_dense']:.2f}x{roof}"


def chains(rows: Rows) -> str:
    """Microseconds per layer in a row of layers."""
    found = of_kind(rows, "chain")
    names = list(dict.fromkeys(r["name"] for r in found))
    lines = []
    for N, M in dict.fromkeys((r["N"], r["M"]) for r in found):
        us = {r["name"]: r["us_per_layer"] for r in found if (r["N"], r["M"]) == (N, M)}
        lines.append([f"{N} x {N}", str(M), *(f"{us[n]:.2f}" if n in us else "" for n in names)])
    return markdown(["layers", "M", *(f"{name}, us" for name in names)], lines)


def models(rows: Rows) -> str:
    """Tokens per second of whole models."""
    lines = [
        [
            row["shape"], row["name"], row["mode"], str(row["batch"]),
            f"{row['decode_tokens_per_s']:.1f}", f"{row['of_roof']:.0%}",
            f"{row['prefill_tokens_per_s']:.0f}", f"{row['memory_bytes'] / 1e9:.1f} GB",
        ]
        for row in of_kind(rows, "decode")
    ]  # fmt: skip
    heads = ["model", "", "step", "batch", "tokens/s", "of roof", "prefill/s", "memory"]
    return markdown(heads, lines)


def aims(rows: Rows) -> str:
    """Every aim with the worst row that it is judged by."""
    lines = []
    timed = of_kind(rows, "time")
    ours = [r for r in timed if r["name"] == "ours" and format_of(r) == MAIN]
    for aim in AIMS:
        judged = [r for r in ours if r["M"] == aim.rows and r["bytes"] >= LARGE]
        if judged:
            worst = min(judged, key=lambda r: r["over_dense"])
            what = f"M={aim.rows}, layers of {LARGE / 1e6:.0f} MB and more"
            found = f"{worst['over_dense']:.2f}x ({worst['N']} x {worst['K']})"
            met = "yes" if worst["over_dense"] >= aim.ratio else "no"
            lines.append([what, f"{aim.ratio}x", found, met])
    decode = [
        r for r in of_kind(rows, "decode")
        if (r["name"], r["batch"], r["shape"]) == ("packed", 1, "Llama-3.1-8B")
    ]  # fmt: skip
    if decode:
        best = max(r["decode_tokens_per_s"] for r in decode)
        met = "yes" if best >= AIM_DECODE else "no"
        lines.append(["Llama-3.1-8B shape, batch 1", f"{AIM_DECODE} tokens/s", f"{best:.0f}", met])
    return markdown(["aim", "at least", "found", "met"], lines)


def slower_than_peers(rows: Rows, limit: int = 64) -> list[str]:
    """Rows of up to `limit` rows of x in which somebody else is faster."""
    timed = of_kind(rows, "time")
    best = {(r["N"], r["K"], r["M"], format_of(r)): r["us"] for r in timed if r["name"] == "ours"}
    found = []
    for r in timed:
        mine = best.get((r["N"], r["K"], r["M"], format_of(r)))
        if mine is not None and r["name"] != "ours" and r["M"] <= limit and r["us"] < mine:
            what = f"{r['N']} x {r['K']}, M={r['M']}, {r['dtype']}, groups of {r['group']}"
            found.append(f"{r['name']} is faster: {what}: {r['us']:.1f} us, ours {mine:.1f} us")
    return found


def page(report: dict[str, Any]) -> str:
    """All tables."""
    rows, head = report["rows"], report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in head["versions"].items() if v)
    bandwidth = [r["gb_per_s"] for r in rows if r["kind"] == "bandwidth"]
    parts = [f"{head['gpu']['name']}; {versions}; commit {head['commit']}."]
    parts += [f"Measured read bandwidth: {bandwidth[0]:.0f} GB/s."] if bandwidth else []
    failed = [r for r in rows if r.get("ok") is False]
    checked = [r for r in rows if "ok" in r]
    parts.append(f"{len(checked)} checks, {len(failed)} failed.")
    parts += [f"- failed: {json.dumps(r)}" for r in failed]
    compared = [r["batch_invariant"] for r in rows if "batch_invariant" in r]
    parts.append(
        f"In {sum(compared)} of {len(compared)} checks the first row of x had the same bits in "
        "every batch up to 64."
    )
    parts.append(aims(rows))
    for stored in dict.fromkeys(map(format_of, of_kind(rows, "time"))):
        dtype, group, symmetric = stored
        kind = "symmetric" if symmetric else "with zero points"
        parts.append(f"4 bits, {kind}, groups of {group}, {dtype}:")
        parts.append(times(rows, stored))
    parts += [chains(rows), models(rows)]
    if slower := slower_than_peers(rows):
        parts.append("\n".join(f"- {line}" for line in slower))
    strange = [r for r in of_kind(rows, "agreement") if not r["distance"] < DISTANT]
    parts += [f"- computes something else: {json.dumps(r)}" for r in strange]
    errors = [r for r in rows if "error" in r]
    parts += [f"- no result: {json.dumps(r)}" for r in errors]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    print(page(json.loads(parser.parse_args().results.read_text())), end="")


if __name__ == "__main__":
    main()
