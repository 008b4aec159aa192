"""The summary of benchmarks/quality.py against ratios computed by hand; AutoRound's files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, BENCHMARKS / path)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def row(name: str, text: str, kl: float, seconds: float, bits: float = 4, **more: Any) -> Any:
    return {
        "model": "m",
        "calibration": "c",
        "text": text,
        "group_size": 64,
        "symmetric": False,
        "name": name,
        "tool": name.split()[0],
        "bits": bits,
        "kl": kl,
        "kl_stderr": kl / 100,
        "perplexity": 10 + kl,
        "full_perplexity": 10.0,
        "windows": 4,
        "seq_len": 8,
        "top1": 0.9,
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        **more,
    }


ROWS = [
    row("llmq rtn", "a", 1.0, 1),
    row("llmq balanced", "a", 0.1, 10),
    row("llmq balanced", "b", 0.2, 10),
    row("gptqmodel default", "a", 0.2, 5),
    row("gptqmodel mse", "a", 0.25, 8),
    row("llmcompressor mse", "b", 0.8, 20),
    row("autoround 200", "a", 0.1, 100),
    row("llmq balanced mixed", "a", 0.15, 12, bits=3.5, predicted_kl=0.18),
]


def test_ratios_are_taken_setting_by_setting():
    found = module("quality_report.py").summary(ROWS)
    ratios = {(r["name"], len(r["against"]), r["bits"]): r for r in found["ratios"]}
    against_gptq = ratios["llmq balanced", 2, 4]
    assert against_gptq["kl"] == pytest.approx((0.5 * 0.25) ** 0.5)  # text a, text b
    assert against_gptq["seconds"] == pytest.approx((10 / 5 * 10 / 20) ** 0.5)
    assert against_gptq["settings"] == 2
    assert ratios["llmq balanced", 1, 4]["kl"] == pytest.approx(1.0)
    assert ratios["llmq balanced", 1, 4]["seconds"] == pytest.approx(0.1)
    assert ratios["llmq balanced mixed", 3, 3.5]["kl"] == pytest.approx(1.5)  # AutoRound's 4 bits
    assert ("llmq best", 1, 4) not in ratios
    [mixed] = found["predictions"]
    assert mixed["ratio"] == pytest.approx(1.2)
    [closed] = found["closed"]
    assert 0.89 < closed["share"] < 0.91
    assert closed["texts"] == {"a": pytest.approx(closed["share"])}


def test_rounding_is_the_start_for_every_calibration():
    more = [
        row("llmq rtn", "b", 1.0, 1),
        row("llmq balanced", "a", 0.1, 10, calibration="d"),
        row("llmq balanced", "b", 0.4, 10, calibration="d"),
    ]
    closed = module("quality_report.py").summary([*ROWS, *more])["closed"]
    shares = {entry["calibration"]: entry for entry in closed}
    assert set(shares["c"]["texts"]) == set(shares["d"]["texts"]) == {"a", "b"}
    assert shares["d"]["share"] == pytest.approx(
        (shares["d"]["texts"]["a"] * shares["d"]["texts"]["b"]) ** 0.5
    )
    worse = row("llmq balanced", "b", 1.4, 10, calibration="d")
    closed = module("quality_report.py").summary([*ROWS, *more[:2], worse])["closed"]
    assert {entry["calibration"]: entry["share"] for entry in closed}["d"] == 0


def test_the_plot_is_the_same_every_time(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    report = module("quality_report.py")
    for name in "ab":
        report.plot(ROWS, tmp_path / f"{name}.svg")
    chart = (tmp_path / "a.svg").read_text()
    assert chart == (tmp_path / "b.svg").read_text()
    assert "AutoRound, 200 iterations" in chart
    assert "CPU seconds" in chart


def test_the_committed_table_can_be_summed_up():
    rows = json.loads((BENCHMARKS / "results" / "quality.json").read_text())["rows"]
    assert module("quality_report.py").summary(rows)["means"]


def test_zero_points_of_autoround_are_stored_as_they_are():
    """2 bits: four codes a byte, lowest first."""
    codes = [0b00_01_10_11] * 8  # per column of 32 weights: 3, 2, 1, 0, ...
    word = int.from_bytes(bytes(codes[:4]), "little")
    tensors = {
        "x.qweight": torch.tensor([[word], [word]], dtype=torch.int32).expand(2, 16).contiguous(),
        "x.qzeros": torch.full((1, 1), 0b01 * 0x55555555, dtype=torch.int32),
        "x.scales": torch.full((1, 16), 0.5),
    }
    read = module("peers/dequantize.py").from_auto_round
    found = read(tensors, "x", {"bits": 2, "packing_format": "auto_round:gptqmodel"})
    assert found.shape == (16, 32)
    assert found[3].tolist() == [1.0, 0.5, 0.0, -0.5] * 8
