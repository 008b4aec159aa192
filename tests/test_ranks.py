"""Two processes that share the calibration text do what one does, up to rounding of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import save_tiny, tiny_text

from llmq import api, ranks
from llmq.moments import second_moments
from llmq.report import REPORT_FILE
from llmq.verify import check

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]


def quantize(processes: int, source: Path, out: Path, *options: str) -> None:
    command = [*LAUNCH, "--standalone", "--nproc-per-node", str(processes), "-m", "llmq"]
    common = ["--samples", "12", "--seq-len", "48", "--group-size", "64", "--device", "cpu"]
    text = str(source / "text.txt")
    subprocess.run(
        [*command, "quantize", source, out, "--calibration", text, *common, *options],
        cwd=HERE.parent,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("llama", 2), ("qwen3_moe", 2)])
def test_shares_of_the_text_add_up(name, processes, tmp_path):
    source = save_tiny(name, tmp_path / "model")
    (source / "text.txt").write_text(tiny_text(300))
    options = {"samples": 12, "seq_len": 48, "group_size": 64, "device": "cpu"}
    text = str(source / "text.txt")
    api.quantize(source, tmp_path / "one", calibration=text, method="gptq", **options)
    quantize(processes, source, tmp_path / "many", "--method", "gptq")
    check(tmp_path / "many")
    reports = [json.loads((tmp_path / x / REPORT_FILE).read_text()) for x in ("one", "many")]
    for a, b in zip(*(report["layers"] for report in reports), strict=True):
        assert a["tokens"] == b["tokens"]
        assert b["error"] == pytest.approx(a["error"], rel=0.05)


SUMS = """
import torch
from llmq import ranks
from llmq.moments import second_moments
ranks.join("cpu")
x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
[(H, count)] = second_moments(iter(x.view(8, 5, 12)[ranks.number()::ranks.count()]))
assert count == 40
torch.testing.assert_close(H, x.T @ x / 40, rtol=1e-6, atol=1e-6)
assert ranks.everyones(ranks.number()) == list(range(ranks.count()))
assert ranks.of_the_first(f"from {ranks.number()}") == "from 0"
assert all(torch.equal(H, other) for other in ranks.everyones(H))  # to the bit
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_second_moments_of_shares_are_those_of_the_whole(processes, tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    command = [*LAUNCH, "--standalone", "--nproc-per-node", str(processes), tmp_path / "sums.py"]
    subprocess.run(command, cwd=HERE.parent, check=True, env=os.environ | {"PYTHONPATH": "."})


@pytest.mark.slow
def test_both_streams_in_two_processes(tmp_path):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    (source / "text.txt").write_text(tiny_text(300))
    quantize(2, source, tmp_path / "a", "--quality", "balanced")
    quantize(2, source, tmp_path / "b", "--quality", "balanced", "--activations", "disk")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]


def test_one_process_needs_no_others():
    assert (ranks.count(), ranks.number()) == (1, 0)
    assert ranks.everyones("x") == ["x"]
    assert ranks.of_the_first("x") == "x"
    x = torch.randn(5, 3)
    [(H, count)] = second_moments([x])
    assert count == 5
    torch.testing.assert_close(H, x.T @ x / 5)
