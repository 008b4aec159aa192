"""A run that is stopped goes on where it was, and ends in the very same bytes."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import save_tiny, tiny_text

from llmq import api, pipeline
from llmq.errors import OutputError
from llmq.hf.streaming import StoredModel
from llmq.journal import Workplace, workplace
from llmq.quantize import quantize as flow
from llmq.verify import check

HERE = Path(__file__).parent
TEXT = [tiny_text(300)]
OPTIONS: dict[str, Any] = {"group_size": 64, "samples": 4, "seq_len": 32, "device": "cpu"}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file's content; of the report, what does not depend on the clock."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop("quantization_log.jsonl")
    found.pop("quantization_report.html")
    report = json.loads(found.pop("quantization_report.json"))
    report.pop("command")  # it names the folder
    report.pop("seconds")
    report.pop("peak_memory_bytes")
    for layer in report["layers"]:
        layer.pop("seconds")
    return found | {"report": json.dumps(report).encode()}


def killed(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `killed.py` makes of jobs."""
    ready = [{"options": OPTIONS | {"calibration": TEXT}, "kill": 0} | job for job in jobs]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "killed.py"],
        input=json.dumps(ready, default=str),
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        check=True,
    )
    return json.loads(done.stdout)


def assert_kills_leave_no_trace(
    names: list[str], kills: int, instants: int, tmp_path: Path, seed: int
) -> int:
    """Per architecture: one run in peace, then one that is killed again and again.

    Args:
        names: architectures.
        kills: per architecture, at random steps.
        instants: per architecture, at random times.
        tmp_path: for everything.
        seed: of what is random.

    Returns:
        how many processes were killed.
    """
    sources = {name: save_tiny(name, tmp_path / name, torch.bfloat16) for name in names}
    peace = killed([{"src": sources[n], "out": tmp_path / f"{n}-peace"} for n in names])
    assert all(result["status"] == 0 for result in peace)
    choose = random.Random(seed)
    jobs = []
    for name, result in zip(names, peace, strict=True):
        job = {"src": sources[name], "out": tmp_path / f"{name}-kills"}
        # A run that goes on has less left: each of these steps is still ahead of it. Instants may
        # come too late, when the run has reached its end, so they come last.
        steps = [choose.randint(1, result["steps"] // (kills + 1)) for _ in range(kills)]
        times = sorted(choose.uniform(0, 0.8 * result["seconds"]) for _ in range(instants))
        jobs += [job | {"kill": step} for step in steps]
        jobs += [job | {"after": after} for after in times] + [job]
    results = killed(jobs)
    each = instants + kills + 1
    for start in range(0, len(jobs), each):
        statuses = [result["status"] for result in results[start : start + each]]
        assert set(statuses[:-1]) <= {-9, 0, 1}  # once it has come to its end, OUT is not empty
        assert statuses[:kills] == [-9] * kills
    for name in names:
        assert bytes_of(tmp_path / f"{name}-kills") == bytes_of(tmp_path / f"{name}-peace"), name
        assert not list(tmp_path.glob(".*"))
    return sum(result["status"] == -9 for result in results)


def test_kills_at_random_instants_leave_no_trace(tmp_path):
    assert assert_kills_leave_no_trace(["llama", "qwen3_moe"], 2, 2, tmp_path, seed=0) >= 4


@pytest.mark.slow
def test_thirty_kills_over_ten_architectures(tmp_path):
    names = ["llama", "gemma3", "phi3", "opt", "gpt_neox", "gpt2", "falcon", "cohere2"]
    assert assert_kills_leave_no_trace([*names, "mixtral", "gpt_oss"], 3, 3, tmp_path, seed=1) >= 30


@pytest.mark.slow
def test_a_kill_at_every_single_step(tmp_path):
    source = save_tiny("qwen3", tmp_path / "model", torch.bfloat16)
    [whole] = killed([{"src": source, "out": tmp_path / "peace"}])
    jobs = []
    for step in range(1, whole["steps"] + 1):
        job = {"src": source, "out": tmp_path / f"k{step}"}
        jobs += [job | {"kill": step}, job]
    results = killed(jobs)
    assert all(result["status"] == -9 for result in results[::2])
    for step in range(1, whole["steps"] + 1):
        assert bytes_of(tmp_path / f"k{step}") == bytes_of(tmp_path / "peace"), step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("journal") / "model", torch.bfloat16)


def stop_after_a_block(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def interrupted(*arguments: Any) -> Any:
        for count, report in enumerate(flow(*arguments)):
            if count == 8:  # a Llama block has seven matrices
                raise error
            yield report

    monkeypatch.setattr(pipeline, "quantize", interrupted)


@pytest.fixture
def stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder whose run was stopped after its first block."""
    with monkeypatch.context() as patch:
        stop_after_a_block(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            api.quantize(model, tmp_path / "out", calibration=TEXT, **OPTIONS)
    return tmp_path / "out"


def test_ctrl_c_says_how_to_go_on_and_the_same_call_does(model, stopped, tmp_path, caplog):
    assert not stopped.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        block = StoredModel.block
        patch.setattr(StoredModel, "block", lambda self, i: opened.append(i) or block(self, i))
        report = api.quantize(model, stopped, calibration=TEXT, **OPTIONS)
    assert opened == [0, 0, 1, 1]  # block 0 only to see how it is called
    assert len(report["layers"]) == 14
    api.quantize(model, tmp_path / "whole", calibration=TEXT, **OPTIONS)
    assert bytes_of(stopped) == bytes_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_the_hint(model, tmp_path, monkeypatch, caplog):
    stop_after_a_block(monkeypatch, KeyboardInterrupt())
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        api.quantize(model, tmp_path / "out", calibration=TEXT, **OPTIONS)
    assert "1 finished blocks are kept in .out.partial" in caplog.text
    assert "Run the same command again to go on" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits was 4, is 3"),
        ({"method": "awq"}, "method was 'balanced', is 'awq'"),
        ({"skip": ["down_proj"]}, r"skip was \[\], is \['down_proj'\]"),
        ({"seed": 1}, "calibration tokens changed"),
    ],
)
def test_another_recipe_is_refused_and_the_difference_named(model, stopped, change, words):
    with pytest.raises(OutputError, match=words):
        api.quantize(model, stopped, calibration=TEXT, **OPTIONS | change)
    assert Workplace(stopped).started() == 1


def test_activations_on_disk_are_the_same_run(model, stopped, tmp_path):
    api.quantize(model, stopped, calibration=TEXT, activations="disk", **OPTIONS)
    api.quantize(model, tmp_path / "whole", calibration=TEXT, **OPTIONS)
    assert bytes_of(stopped) == bytes_of(tmp_path / "whole")


def test_fresh_starts_over(model, stopped, tmp_path):
    report = api.quantize(model, stopped, calibration=TEXT, fresh=True, bits=8, **OPTIONS)
    assert {layer["bits"] for layer in report["layers"]} == {8}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_second_process_is_refused(model, stopped):
    script = (
        "import sys; from llmq.journal import workplace\n"
        "with workplace(sys.argv[1]):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, stopped],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=HERE.parent,
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(OutputError, match="another process"):
            api.quantize(model, stopped, calibration=TEXT, **OPTIONS)
        other.kill()  # the system frees its lock
    assert Workplace(stopped).started() == 1
    api.quantize(model, stopped, calibration=TEXT, **OPTIONS)
    assert (stopped / "model.safetensors").is_file()


def test_a_run_that_was_stopped_while_it_tidied_up_leaves_nothing(model, tmp_path):
    out, hidden = tmp_path / "out", tmp_path / ".out.partial"
    api.quantize(model, out, calibration=TEXT, **OPTIONS)
    hidden.mkdir()
    (hidden / "part-00000.safetensors").touch()  # its journal was removed before
    with pytest.raises(OutputError, match="not empty"):
        api.quantize(model, out, calibration=TEXT, **OPTIONS)
    assert not hidden.exists()
    check(out)


def test_other_folders_do_not_share_a_workplace(tmp_path):
    with workplace(tmp_path / "a" / "model") as a, workplace(tmp_path / "b" / "model") as b:
        assert a.folder != b.folder
    assert list(tmp_path.iterdir()) == []
