"""The time that is left: by hand, and of runs that were recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmq.progress import Pace, duration

RECORDED = json.loads((Path(__file__).parents[1] / "benchmarks/results/memory.json").read_text())


def test_the_time_that_is_left():
    pace = Pace(100.0, 33)
    assert pace.remaining() is None
    pace.note(130.0, 3)
    assert pace.remaining() == 300
    pace.note(139.0, 6)  # 3 s a step from here on: the first ones had to wait
    assert pace.remaining() == 81
    pace.note(139.0, 6)
    assert pace.remaining() == 81
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
    pace = Pace(0.0, len(ends))
    done = max(2, math.ceil(len(ends) / 10))
    for finished in range(1, done + 1):
        pace.note(ends[finished - 1], finished)
    assert pace.remaining() == pytest.approx(ends[-1] - ends[done - 1], rel=0.15)
