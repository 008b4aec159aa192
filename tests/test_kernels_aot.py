"""What the compiler makes of the kernels, for GPUs that are not here: see benchmarks/aot.py."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")
ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks/results/aot.json"


def compile_for(arch: int, only: str) -> None:
    """Compile the configurations whose name holds `only`; fails with the table if one is bad."""
    done = subprocess.run(
        [sys.executable, "benchmarks/aot.py", "--arch", str(arch), "--only", only],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"sm_{arch}" in done.stdout


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_machine_code_of_the_main_format(arch: int) -> None:
    compile_for(arch, "w4 g128 asym bf16")


@pytest.mark.parametrize(
    "only", ["w4 g32 asym bf16", "w8 g32 asym bf16", "w3 g32 asym", "pdl", "solve"]
)
def test_machine_code_of_other_formats_on_hopper(only: str) -> None:
    compile_for(90, only)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_machine_code_of_everything(arch: int) -> None:
    compile_for(arch, "")


def test_committed_report_has_both_compilers_and_no_complaints() -> None:
    report = json.loads(REPORT.read_text())
    assert set(report) == {"triton 3.6.0", "triton 3.9.0"}
    for version, rows in report.items():
        for arch in (80, 89, 90, 100):
            assert any(name.startswith(f"sm_{arch} w4") for name in rows), (version, arch)
        for name, row in rows.items():
            assert not row["complaints"], (version, name, row["complaints"])


def test_committed_report_holds_the_bar_of_every_format_on_hopper() -> None:
    formats = itertools.product((2, 3, 4, 8), (32, 64, 128, -1), ("sym", "asym"), ("bf16", "fp16"))
    every = [f"sm_90 w{w} g{g} {symmetry} {dtype} " for w, g, symmetry, dtype in formats]
    for version, rows in json.loads(REPORT.read_text()).items():
        for start in every:
            found = [row for n, row in rows.items() if n.startswith(start) and " BM16 " in n]
            assert found, (version, start)
            for row in found:
                assert row["per_weight"] <= 3.2, (version, start, row)
                assert row["spills"] == 0, (version, start, row)
                assert not {"I2F", "STS"} & row["loop_counts"].keys(), (version, start, row)


def test_committed_report_is_about_the_launches_of_today(monkeypatch) -> None:
    """A launch that the closed form has since changed would be a row that is not there."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    aot = importlib.import_module("aot")
    names = {
        f"sm_{arch} {config.name()}"
        for arch in (80, 89, 90, 100)
        for config in (*aot.small(arch), *aot.variants(arch))
    }
    names |= {
        f"sm_{arch} solve {kernel} {columns} columns"
        for arch, kernel, columns in itertools.product(
            (80, 89, 90, 100), aot.SOLVING, (32, 64, 128)
        )
    }
    assert len(names) > 100
    for version, rows in json.loads(REPORT.read_text()).items():
        assert names <= rows.keys(), (version, names - rows.keys())
        others = rows.keys() - names
        assert all("dequantize" in name for name in others), (version, others)
