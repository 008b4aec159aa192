"""Two processes that share the calibration text do what one does, up to rounding of sums."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import save_tiny, tiny_text

from llmq import api, ranks
from llmq.errors import ProcessError
from llmq.journal import Workplace
from llmq.moments import second_moments
from llmq.report import REPORT_FILE
from llmq.verify import CHECKSUMS, check

HERE = Path(__file__).parent
AT_ONCE = 900  # seconds on any machine; gloo waits for half an hour if nobody tells it
LAUNCH = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]


def quantize(
    processes: int, source: Path, out: Path, *options: str, dies: tuple[int, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """Of the processes, one may die: its number, and at which step (see dying.py)."""
    command = [*LAUNCH, "--standalone", "--nproc-per-node", str(processes)]
    command += [str(HERE / "dying.py"), *map(str, dies or (-1, 0))]
    common = ["--samples", "24", "--seq-len", "48", "--group-size", "64", "--device", "cpu"]
    text = str(source / "text.txt")
    return subprocess.run(
        [*command, "quantize", source, out, "--calibration", text, *common, *options],
        cwd=HERE.parent,
        check=not dies,
        timeout=AT_ONCE,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parent / 'kernels'}"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("llama", 2), ("qwen3_moe", 2)])
def test_shares_of_the_text_add_up(name, processes, tmp_path):
    source = save_tiny(name, tmp_path / "model")
    (source / "text.txt").write_text(tiny_text(300))
    options = {"samples": 24, "seq_len": 48, "group_size": 64, "device": "cpu"}
    text = str(source / "text.txt")
    api.quantize(source, tmp_path / "one", calibration=text, method="gptq", **options)
    quantize(processes, source, tmp_path / "many", "--method", "gptq")
    check(tmp_path / "many")
    reports = [json.loads((tmp_path / x / REPORT_FILE).read_text()) for x in ("one", "many")]
    for a, b in zip(*(report["layers"] for report in reports), strict=True):
        # Sums in another order may send a token that is undecided to another expert.
        undecided = 0.01 if "experts" in a["name"] else 0
        assert b["tokens"] == pytest.approx(a["tokens"], rel=undecided, abs=0)
        assert b["error"] == pytest.approx(a["error"], rel=0.05)


SUMS = """
import torch
from llmq import ranks
from llmq.errors import ProcessError
from llmq.journal import Workplace
from llmq.moments import second_moments
ranks.join("cpu")
x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
[(H, count)] = second_moments(iter(x.view(8, 5, 12)[ranks.number()::ranks.count()]))
assert count == 40
torch.testing.assert_close(H, x.T @ x / 40, rtol=1e-6, atol=1e-6)
assert ranks.everyones(ranks.number()) == list(range(ranks.count()))
assert ranks.of_the_first(f"from {ranks.number()}") == "from 0"
assert ranks.highest(ranks.number()) == ranks.count() - 1
assert ranks.own_gpu(8) == ranks.number()
try:
    ranks.own_gpu(1)
except ProcessError as error:
    assert "use --nproc-per-node 1 at most" in str(error)
else:
    raise AssertionError("two processes on one GPU")
assert all(torch.equal(H, other) for other in ranks.everyones(H))  # to the bit
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_second_moments_of_shares_are_those_of_the_whole(processes, tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    command = [*LAUNCH, "--standalone", "--nproc-per-node", str(processes), tmp_path / "sums.py"]
    path = f"{HERE.parent}{os.pathsep}{HERE.parent / 'kernels'}"
    subprocess.run(command, cwd=HERE.parent, check=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_both_streams_in_two_processes(tmp_path):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    (source / "text.txt").write_text(tiny_text(300))
    quantize(2, source, tmp_path / "a", "--quality", "balanced")
    quantize(2, source, tmp_path / "b", "--quality", "balanced", "--activations", "disk")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]


DEATH = """
import os, signal, sys, time
from llmq import ranks
from llmq.errors import ProcessError
ranks.join("cpu")
try:
    assert ranks.everyones(1) == [1, 1]
    if ranks.number() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.everyones(2)
    time.sleep(2 * 1800)
except ProcessError as error:
    print(error, flush=True)
    sys.exit(1)
"""


def test_the_death_of_one_process_is_told_by_the_others(tmp_path):
    (tmp_path / "death.py").write_text(DEATH)
    command = [*LAUNCH, "--standalone", "--nproc-per-node", "2", tmp_path / "death.py"]
    path = f"{HERE.parent}{os.pathsep}{HERE.parent / 'kernels'}"
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=AT_ONCE,
    )
    assert done.returncode != 0
    assert "Another process of this run has ended. Its own message says why" in done.stdout
    assert "SIGKILL" in done.stderr  # torchrun says which


def test_the_signal_that_torchrun_sends_then_hides_nothing():
    before = signal.signal(signal.SIGTERM, ranks._stopped)
    try:
        with pytest.raises(ProcessError, match="Another process") as told, ranks._others_alive():
            raise RuntimeError("Connection closed by peer")
        signal.raise_signal(signal.SIGTERM)
        assert isinstance(told.value.__cause__, RuntimeError)
        signal.signal(signal.SIGTERM, ranks._stopped)
        with pytest.raises(ProcessError, match="Another process"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "dying"), [(2, 1), (2, 0), (4, 2)])
def test_a_run_goes_on_after_one_of_its_processes_died(processes, dying, tmp_path):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16, num_hidden_layers=3)
    (source / "text.txt").write_text(tiny_text(300))
    quantize(processes, source, tmp_path / "peace")
    # It dies in its second block. Each block makes 12 files, and 3 of the gate in process 0, which
    # makes 3 more before the first.
    steps = 12 + 5 if dying else 18 + 5
    done = quantize(processes, source, tmp_path / "out", dies=(dying, steps))
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    assert Workplace(tmp_path / "out").started() == 1
    assert f"local_rank: {dying}" in done.stderr
    if dying:
        assert "llmq: Another process of this run has ended" in done.stderr
        assert "1 finished blocks are kept" in done.stderr
    quantize(processes, source, tmp_path / "out")
    sums = [(tmp_path / name / CHECKSUMS).read_text() for name in ("out", "peace")]
    assert sums[0] == sums[1]
    assert not list(tmp_path.glob(".*"))


def test_one_process_needs_no_others():
    assert (ranks.count(), ranks.number()) == (1, 0)
    assert ranks.everyones("x") == ["x"]
    assert ranks.of_the_first("x") == "x"
    assert ranks.highest(3) == 3
    x = torch.randn(5, 3)
    [(H, count)] = second_moments([x])
    assert count == 5
    torch.testing.assert_close(H, x.T @ x / 5)
