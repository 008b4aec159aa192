"""The script for a machine with a GPU, tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks/on_gpu.py"


def test_dry_run_checks_and_measures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads(out.read_text())
    kinds = {row["kind"] for row in report["rows"]}
    assert {"check", "operator", "bandwidth", "time", "chain", "decode"} <= kinds
    assert not [row for row in report["rows"] if "error" in row]
    assert all(row["ok"] for row in report["rows"] if "ok" in row)
    times = {(row["name"], row["dtype"]) for row in report["rows"] if row["kind"] == "time"}
    assert times >= {(n, d) for n in ("ours", "dense") for d in ("bfloat16", "float16")}
    decoded = [row for row in report["rows"] if row["kind"] == "decode"]
    assert [(row["name"], row["batch"]) for row in decoded] == [
        ("packed", 1), ("packed", 2), ("dense", 1), ("dense", 2),
    ]  # fmt: skip
    assert all(row["shape"] == "tiny" and row["decode_tokens_per_s"] > 0 for row in decoded)
    (page,) = run("kernels.py", out)
    assert "64 x 128" in page
    assert "no result" not in page


def run(script: str, *arguments: Path) -> list[str]:
    """Standard output of a script of benchmarks/."""
    command = [sys.executable, str(SCRIPT.with_name(script)), *map(str, arguments)]
    return [subprocess.run(command, capture_output=True, text=True, check=True).stdout]


def made_up(tmp_path: Path) -> Path:
    """A report of no machine: numbers chosen so that tables can be checked by eye."""
    shape = {"group": 128, "dtype": "bfloat16"}
    large, small = {"N": 57344, "K": 8192} | shape, {"N": 4096, "K": 4096} | shape
    rows: list[dict] = [
        {"kind": "check", "bits": 4, "ok": True},
        {"kind": "operator", "what": "made up", "ok": False},
        {"kind": "bandwidth", "gb_per_s": 4000.0},
    ]
    for where, nbytes in ((large, 242e6), (small, 8.7e6)):
        for M, ratio in ((1, 3.25), (16, 2.5)):
            rows += [
                {"kind": "time", "name": "dense", "M": M, "us": 100.0, "over_dense": 1.0} | where,
                {
                    "kind": "time", "name": "ours", "M": M, "us": 100 / ratio,
                    "over_dense": ratio, "of_roof": 0.875, "bytes": nbytes,
                } | where,
            ]  # fmt: skip
    rows.append(
        {"kind": "time", "name": "tinygemm", "M": 16, "us": 20.0, "over_dense": 5.0} | small
    )
    rows.append({"kind": "time", "name": "marlin", "M": 16, "error": "made up"} | small)
    for name, us in (("dense", 9.0), ("ours", 4.0), ("ours pdl", 3.0)):
        rows.append({"kind": "chain", "name": name, "N": 4096, "M": 1, "us_per_layer": us})
    rows.append(
        {
            "kind": "decode", "name": "packed", "shape": "Llama-3.1-8B", "mode": "graph",
            "batch": 1, "decode_tokens_per_s": 440.0, "of_roof": 0.5,
            "prefill_tokens_per_s": 1e4, "memory_bytes": 6e9,
        }
    )  # fmt: skip
    head = {"gpu": {"name": "made up"}, "versions": {"torch": "0"}, "commit": "none"}
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps({"environment": head, "rows": rows}))
    return path


def test_tables_of_made_up_numbers(tmp_path: Path) -> None:
    (page,) = run("kernels.py", made_up(tmp_path))
    assert "2 checks, 1 failed." in page
    assert "4000 GB/s" in page
    assert "| 57344 x 8192 | ours | 3.25x 88% | 2.50x 88% |" in page
    assert "| 4096 x 4096 | tinygemm |  | 5.00x |" in page
    assert "| M=1, layers of 30 MB and more | 3.0x | 3.25x (57344 x 8192) | yes |" in page
    assert "| M=16, layers of 30 MB and more | 2.9x | 2.50x (57344 x 8192) | no |" in page
    assert "| Llama-3.1-8B shape, batch 1 | 450 tokens/s | 440 | no |" in page
    assert "| 4096 x 4096 | 1 | 9.00 | 4.00 | 3.00 |" in page
    assert "tinygemm is faster: 4096 x 4096, M=16" in page
    assert '- no result: {"kind": "time", "name": "marlin"' in page


def test_charts_of_made_up_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = made_up(tmp_path)
    for name in ("a.svg", "b.svg"):
        run("plot.py", path, tmp_path / name)
    chart = (tmp_path / "a.svg").read_text()
    assert chart == (tmp_path / "b.svg").read_text()
    for text in ("57344 x 8192", "4096 x 4096", "llmq", "tinygemm", "rows of x"):
        assert text in chart
    assert "Marlin" not in chart  # it gave no result


def test_the_chart_of_the_quality_table_is_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = SCRIPT.parent / "results"
    run("plot.py", results / "perplexity.json", tmp_path / "a.svg")
    for text in ("stored bits per weight", "AWQ + GPTQ", "nats per token"):
        assert text in (tmp_path / "a.svg").read_text()
