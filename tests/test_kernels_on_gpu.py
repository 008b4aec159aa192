"""The script for a machine with a GPU, tried without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kernels_cases
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
SCRIPT = Path(__file__).parents[1] / "benchmarks/on_gpu.py"


@pytest.mark.skipif(
    not kernels_cases.interpreter_runs(), reason="triton 3.6's interpreter needs numpy < 2.4"
)
def test_dry_run_checks_and_measures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--minutes", "600", "--out", str(out)],
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
    stored = {(r["group"], r["symmetric"]) for r in report["rows"] if r["kind"] == "time"}
    assert stored == {(128, True), (128, False), (64, True), (32, True), (-1, True)}
    agreed = [row["distance"] for row in report["rows"] if row["kind"] == "agreement"]
    assert agreed
    assert max(agreed) < 0.01
    decoded = [row for row in report["rows"] if row["kind"] == "decode"]
    assert [(row["name"], row["batch"]) for row in decoded] == [
        ("packed", 1), ("packed", 2), ("dense", 1), ("dense", 2),
    ]  # fmt: skip
    assert all(row["shape"] == "tiny" and row["decode_tokens_per_s"] > 0 for row in decoded)
    assert [bool(row["backends"]) for row in decoded] == [True, True, False, False]
    (page,) = run("kernels.py", out)
    assert "64 x 128" in page
    assert "no result" not in page


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["on_gpu"] = module
    spec.loader.exec_module(module)
    return module


SECTION = """
import json, os, pathlib, sys, time
out, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
found = json.loads(out.read_text()) if out.is_file() else {"environment": {}, "rows": []}
found["rows"].append({"kind": "check", "of": kind, "share": sys.argv[3], "ok": kind != "wrong"})
out.write_text(json.dumps(found))
print("a reason", file=sys.stderr, flush=True)
if kind == "crash":
    os.abort()
if kind == "hang":
    out.with_name("hangs").touch()
    time.sleep(10_000)
"""


def test_a_section_costs_only_its_own_rows(tmp_path: Path, on_gpu, monkeypatch) -> None:
    hangs = tmp_path / "hangs"

    class Process(subprocess.Popen):
        """Its time begins when it hangs; what does not hang ends, however slow the machine is."""

        def wait(self, timeout: float | None = None) -> int:
            while not hangs.exists() and self.poll() is None:
                time.sleep(0.01)
            hangs.unlink(missing_ok=True)
            return super().wait(timeout)

    def command(name: str, seconds: float, out: Path, share: str) -> list[str]:
        return [sys.executable, "-c", SECTION, str(out), name, share]

    monkeypatch.setattr(on_gpu.subprocess, "Popen", Process)
    report = on_gpu.Report(tmp_path / "gpu.json", 10_000, {"gpu": "none"})
    report.add("check", of="before", ok=True)
    for name, processes in (("crash", 1), ("hang", 1), ("fine", 1), ("wrong", 3), ("crash", 2)):
        section = on_gpu.Section(lambda *_: None, 1, processes)
        on_gpu.in_processes(report, name, section, command, grace=1)
    report.end = 0.0
    on_gpu.in_processes(report, "late", on_gpu.Section(lambda *_: None, 1), command)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["environment"] == {"gpu": "none"}
    checks = [(r["of"], r.get("share")) for r in written["rows"] if r["kind"] == "check"]
    assert checks == [
        ("before", None), ("crash", "0/1"), ("hang", "0/1"), ("fine", "0/1"),
        *(("wrong", f"{i}/3") for i in range(3)), *(("crash", f"{i}/2") for i in range(2)),
    ]  # fmt: skip
    errors = [(r["name"], r["error"]) for r in written["rows"] if "error" in r]
    assert errors == [
        ("crash", "ended with status -6"), ("hang", "was stopped: it took too long"),
        *[("crash", "ended with status -6")] * 2, ("late", "no time was left for it"),
    ]  # fmt: skip
    assert all("a reason" in r["tail"] for r in written["rows"] if "tail" in r)
    assert report.failed() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_sections_fit_into_one_call(on_gpu) -> None:
    """Ten minutes: the first ones are what the aims are about."""
    script = on_gpu.command("times", 30.4, Path("x.json"), "0/1")
    assert script[1:] == [
        str(SCRIPT), "--section", "times", "--seconds", "30", "--out", "x.json", "--share", "0/1",
    ]  # fmt: skip
    names = list(on_gpu.SECTIONS)
    assert names[:5] == ["first", "times", "decode", "solvers", "chains"]
    assert sum(on_gpu.SECTIONS[name].seconds for name in names[:5]) < 9 * 60


def test_what_the_aims_are_about_is_decoded_first(on_gpu) -> None:
    """The packed model both ways and the dense one, before a second minute of compiling."""
    gpu_decode = importlib.import_module("gpu_decode")
    todo = gpu_decode.order((1, 16), dry=False)
    assert len(set(todo)) == len(todo) == 8
    assert next(t for t in todo if t[1] == "compiled graph") == ("packed", "compiled graph", 1)
    assert {t[0] for t in todo[:5]} == {"packed", "dense"}
    assert sum(t[1] == "compiled graph" for t in todo[:5]) == 1


def test_a_row_that_fails_is_a_row(tmp_path: Path, on_gpu, monkeypatch) -> None:
    from llmq_kernels import plan

    gpu_checks, gpu_times = map(importlib.import_module, ("gpu_checks", "gpu_times"))

    def broken(*args, **options):
        raise RuntimeError("made up")

    monkeypatch.setattr(gpu_checks, "ours", broken)
    monkeypatch.setattr(gpu_times, "ours", broken)
    monkeypatch.setattr(gpu_checks, "_experts", broken)
    monkeypatch.setattr("llmq_kernels.launch.dequantize", lambda *_: None)
    monkeypatch.setattr(gpu_times, "SLOW", 10_000)
    report = on_gpu.Report(tmp_path / "gpu.json", 10_000, {})
    device, gpu = torch.device("cpu"), plan.Gpu("none", (9, 0), 4)
    gpu_checks.checks(report, device, gpu, gpu_checks.all_formats(True), [(64, 128)], (1,))
    gpu_checks.operator_checks(report, device)
    gpu_times.times(report, device, gpu, [(64, 128)], (1, 2), 1.0)
    failed = [(r["kind"], r.get("ok")) for r in report.rows if "made up" in r.get("error", "")]
    assert failed == [("check", False)] * 2 + [("operator", False), ("time", None)]
    assert sum(row.get("ok") is True for row in report.rows) == 3  # the other operators
    assert [r["name"] for r in report.rows if "us" in r] == ["dense", "dense"]


def run(script: str, *arguments: Path) -> list[str]:
    """Standard output of a script of benchmarks/."""
    command = [sys.executable, str(SCRIPT.with_name(script)), *map(str, arguments)]
    return [subprocess.run(command, capture_output=True, text=True, check=True).stdout]


def made_up(tmp_path: Path) -> Path:
    """A report of no machine: numbers chosen so that tables can be checked by eye."""
    shape = {"group": 128, "dtype": "bfloat16", "symmetric": True}
    large, small = {"N": 57344, "K": 8192} | shape, {"N": 4096, "K": 4096} | shape
    rows: list[dict] = [
        {"kind": "check", "bits": 4, "ok": True, "batch_invariant": True},
        {"kind": "agreement", "name": "marlin", "distance": float("nan")} | shape,
        {"kind": "agreement", "name": "tinygemm", "distance": 0.003} | shape,
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
    assert "In 1 of 1 checks the first row of x had the same bits" in page
    assert page.count("computes something else") == 1
    assert '- computes something else: {"kind": "agreement", "name": "marlin"' in page


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
