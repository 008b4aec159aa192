"""The Triton kernels against float64, run by Triton's interpreter in a process of its own.

Every case also runs twice (same bits), with outputs poisoned with NaN, and checks the
dequantizing kernel, which must be exact. Error bar: twice that of torch's dense product.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import kernels_cases
import pytest

pytest.importorskip("triton", minversion="3.6")
pytestmark = pytest.mark.skipif(
    not kernels_cases.interpreter_runs(), reason="triton 3.6's interpreter needs numpy < 2.4"
)
ROOT = Path(__file__).parents[1]


def interpret(which: str, *names: str) -> list[dict]:
    """Run cases of tests/kernels_cases.py under the interpreter."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests", ".")),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kernels_cases.py"), which, *names],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def judge(row: dict) -> None:
    assert row["error"] <= 2 * row["dense"], row
    # Groups of 32 round weights to the dtype of x, as a dense layer does; others keep integers.
    assert row["error_float32"] < (1.1 * row["dense"] if row["group"] == 32 else 1e-6), row
    assert row["error_stored"] <= 2 * row["dense"], row
    assert row["stored_is_rounded"], row
    assert row["repeatable"], row
    assert row["counters_zero"], row
    assert row["dequantize"], row


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    names = [case.name() for case in kernels_cases.chosen()]
    return {row["name"]: row for row in interpret("default", *names)}


@pytest.mark.parametrize("name", [case.name() for case in kernels_cases.chosen()])
def test_kernel_in_the_interpreter(rows: dict[str, dict], name: str) -> None:
    judge(rows[name])


def test_the_other_formats_in_the_interpreter() -> None:
    """With those above: all of (bits, group, symmetry, dtype), split along K, with padding."""
    rows = interpret("formats")
    assert len({row["name"] for row in rows}) == 4 * 4 * 2 * 2 - 4 * 4
    for row in rows:
        assert row["error"] <= 2 * row["dense"], row
        assert row["error_float32"] < (1.1 * row["dense"] if row["group"] == 32 else 1e-6), row
        assert row["counters_zero"], row
        assert row["dequantize"], row


def test_loops_of_solvers_in_the_interpreter() -> None:
    """Against float64: the same codes but for ties, also with dead columns and outliers."""
    rows = interpret("solvers")
    assert len(rows) == len(kernels_cases.SOLVER_SHAPES)
    for row in rows:
        assert row["codes"] > 0.99, row
        assert row["lost"] < 1e-6, row
        assert row["errors"] < 1e-5, row
        assert row["moved"] > 0.99, row
        assert row["moves"] > 0.2, row
        assert row["repeatable"], row


@pytest.mark.parametrize("name", ["experts", "experts-split"])
def test_grouped_kernel_in_the_interpreter(name: str) -> None:
    (row,) = interpret("experts", name)
    judge(row | {"dequantize": True})


@pytest.mark.slow
def test_the_check_of_a_new_device_accepts_the_kernels() -> None:
    (row,) = interpret("selfcheck")
    assert row["reason"] is None


def test_the_thinned_matrix_holds_every_combination_of_three() -> None:
    met = [
        (case[:4], (case.tiles, case.block_m, case.unroll, case.split), (case.M, case.N))
        for case in kernels_cases.full()
    ]
    rows = [(*form, launch, shape) for form, launch, shape in met]
    for three in itertools.combinations(range(6), 3):
        columns = [{row[i] for row in rows} for i in three]
        assert {tuple(row[i] for i in three) for row in rows} == set(itertools.product(*columns))


@pytest.mark.slow
@pytest.mark.parametrize("bits", kernels_cases.BITS)
def test_every_format_and_launch_in_the_interpreter(bits: int) -> None:
    """Every format, and the thinned matrix of `kernels_cases.full`: 206 cases of about 2 seconds.

    pytest -n 0 -m slow tests/test_kernels_interpreter.py
    """
    cases = {"default": [*kernels_cases.formats(), *kernels_cases.shapes()]}
    cases["full"] = kernels_cases.full()
    for which, all_widths in cases.items():
        for row in interpret(which, *(case.name() for case in all_widths if case.bits == bits)):
            judge(row)
