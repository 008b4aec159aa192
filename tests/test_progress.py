"""The time that is left: by hand, and of runs that were recorded."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmq.progress import Pace, duration

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORDED = json.loads((BENCHMARKS / "results" / "memory.json").read_text())


def test_the_time_that_is_left():
    pace = Pace(100.0, 33)
    assert pace.remaining() is None
    pace.note(121.0, 0)  # the first step only begins now
    assert pace.remaining() is None
    pace.note(130.0, 3)
    assert pace.remaining() == 90
    pace.note(151.0, 6)  # 5 s a step, seen from the first one
    assert pace.remaining() == 135
    pace.note(151.0, 6)
    assert pace.remaining() == 135
    pace.note(220.0, 33)
    assert pace.remaining() == 0
    resumed = Pace(0.0, 33, before=16)
    assert resumed.remaining() is None
    resumed.note(30.0, 19)
    assert resumed.remaining() == 140
    assert [duration(s) for s in (0, 140.4, 7200, 3723)] == ["0:00", "2:20", "2:00:00", "1:02:03"]


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: f"{run['layers']} layers")
def test_the_time_that_is_left_of_recorded_runs(run):
    """Right within 15 % when a tenth of the layers is done, and two of them at least."""
    ends = run["block_ends"]
    pace = Pace(run["begun"], len(ends))
    done = max(2, math.ceil(len(ends) / 10))
    for finished in range(1, done + 1):
        pace.note(ends[finished - 1], finished)
    assert pace.remaining() == pytest.approx(ends[-1] - ends[done - 1], rel=0.15)


def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("eta", BENCHMARKS / "eta.py")
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_benchmark_of_predictions(monkeypatch: pytest.MonkeyPatch):
    eta = benchmark(monkeypatch)
    assert [eta.tenth(blocks) for blocks in (4, 20, 32)] == [2, 2, 4]
    even = eta.judged(20.0, [30.0, 40.0, 50.0, 60.0], 70.0)  # the first block had to wait
    assert [row["done"] for row in even] == [1, 2, 3]
    assert [row["error"] for row in even] == [0, 0, 0]
    assert even[1]["error_of_the_run"] == pytest.approx(20 / 30 - 1)
    slower = eta.judged(0.0, [10.0, 20.0, 40.0, 60.0], 60.0)
    assert slower[1]["error"] == -0.5
