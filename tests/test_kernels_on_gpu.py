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
    assert {"check", "operator", "bandwidth", "time"} <= kinds
    assert all(row["ok"] for row in report["rows"] if "ok" in row)
    assert {row["name"] for row in report["rows"] if row["kind"] == "time"} >= {"ours", "dense"}
