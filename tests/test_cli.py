"""The command line: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from zoo import save_tiny

import llmq
from llmq import demo, showcase
from llmq.sensitivity import MATCHED
from llmq.stored import inspect_checkpoint


def test_quantize_eval_inspect_generate(run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = run(
        "quantize", model, out, "--calibration", text, "--skip", "down_proj", "--json", *QUICK
    )
    assert status == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert stdout.count("\n") == 1  # tables went to standard error
    assert report["bits_per_weight"] == pytest.approx(4.26, abs=0.01)
    assert report["calibration"]["tokens"] == 4 * 64
    assert {"seconds", "peak_memory_bytes"} <= report.keys()
    written = json.loads((out / "quantization_report.json").read_text())
    assert len(written["layers"]) == 12
    assert all(layer["error"] < 0.05 for layer in written["layers"])
    assert os.listdir(tmp_path) == ["out"]

    status, stdout, _ = run(
        "eval", out, "--text", text, "--seq-len", "64", "--windows", "6", "--reference", model
    )
    assert status == 0
    assert "6 non-overlapping windows of 64 tokens, no BOS, 378 tokens scored" in stdout
    status, stdout, _ = run(
        "eval", out, "--text", text, "--seq-len", "64", "--reference", model, "--json"
    )
    found = json.loads(stdout.splitlines()[-1])
    assert found["bits_per_weight"] == report["bits_per_weight"]
    assert 0 < found["kl"] < 0.1
    assert 0.5 < found["top1"] <= 1
    keys = {"perplexity", "perplexity_stderr", "tokens", "seconds", "peak_memory_bytes"}
    assert keys <= found.keys()
    same = llmq.evaluate(out, text, seq_len=64, reference=model)
    assert (same.perplexity, same.kl) == (found["perplexity"], found["kl"])

    status, stdout, _ = run("inspect", out, "--json")
    layers = {layer["name"]: layer for layer in json.loads(stdout.splitlines()[-1])["layers"]}
    assert layers["model.layers.0.mlp.up_proj"]["scheme"] == "int4 g64 symmetric"
    assert layers["model.layers.0.mlp.up_proj"]["error"] > 0
    assert "model.layers.0.mlp.down_proj" not in layers  # skipped
    assert run("inspect", out)[0] == run("inspect", model)[0] == 0

    state = torch.get_rng_state()
    once = run("generate", out, "--prompt", "The", "--temperature", "1", "--max-new-tokens", "8")
    again = run("generate", out, "--prompt", "The", "--temperature", "1", "--max-new-tokens", "8")
    assert once == again
    assert once[0] == 0
    assert once[1].startswith("The")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "fast", "balanced"])
def test_every_method_runs_from_the_command_line(run, model, text, tmp_path, method) -> None:
    kind = "--quality" if method in ("fast", "balanced") else "--method"
    options = [kind, method, "--calibration", text, "--bits", "3", "--symmetric", *QUICK]
    status, _, stderr = run("quantize", model, tmp_path / "out", *options)
    assert status == 0, stderr
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert (report["method"], report["bits"], report["symmetric"]) == (method, 3, True)


def test_an_average_of_bits(run, model, text, tmp_path) -> None:
    options = ["--calibration", text, "--quality", "fast", *QUICK]
    status, _, stderr = run("quantize", model, tmp_path / "out", "--bits", "3.5", *options)
    assert status == 0, stderr
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    weights = [math.prod(layer["shape"]) for layer in report["layers"]]
    bits = [layer["bits"] for layer in report["layers"]]
    assert len(set(bits)) > 1
    # In the bytes of 3.5 bits in groups of 64, of which larger groups leave more for codes.
    groups = [layer["group_size"] for layer in report["layers"]]
    total = sum(w * (b + 16 / g) for w, b, g in zip(weights, bits, groups, strict=True))
    assert 3.3 + 16 / 64 < total / sum(weights) <= 3.5 + 16 / 64
    stored = {layer.name: layer.scheme for layer in inspect_checkpoint(tmp_path / "out")[:-1]}
    assert all(stored[e["name"]].startswith(f"int{e['bits']} ") for e in report["layers"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    formats = set(zip(bits, groups, strict=True))
    assert len(config["quantization_config"]["config_groups"]) == len(formats)
    assert run("eval", tmp_path / "out", "--text", text, "--seq-len", "64")[0] == 0

    status, stdout, stderr = run(
        "sensitivity", model, "--bits", "3.5", "--json", "--calibration", text, *QUICK
    )
    assert status == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    least, most = (share * MATCHED * report["predicted_kl"] for share in (0.5, 1.0))
    assert least < found["predicted_kl"] < most  # of balanced, whose rows have feedback
    assert "Most lost per weight" in stderr
    rest = ["--target-size", "310KB", *options]
    assert run("quantize", model, tmp_path / "sized", *rest)[0] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "sized").glob("*.safetensors"))
    assert 290_000 < size <= 310_000
    status, _, stderr = run("quantize", model, tmp_path / "b", *options, "--target-size", "9KB")
    assert (status, "Raise the size" in stderr) == (1, True)
    rest = ["--bits", "3.5", "--widths", "4,8", *options]
    assert "no average of widths from 4" in run("quantize", model, tmp_path / "b", *rest)[2]
    status, _, stderr = run("quantize", model, tmp_path / "b", "--bits", "1.5", *options)
    assert (status, "between 2 and 8" in stderr) == (1, True)


def test_python_and_the_command_write_the_same_bytes(run, model, text, tmp_path) -> None:
    run("quantize", model, tmp_path / "a", "--calibration", text, *QUICK)
    llmq.quantize(
        model, tmp_path / "b", calibration=str(text), samples=4, seq_len=64, group_size=64
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_embedded_text_is_the_default_and_says_so(run, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "calibration_path", lambda: text)
    # Far less text than 128 windows: what there is must do.
    options = ["--group-size", "64", "--seq-len", "128"]
    status, stdout, stderr = run("quantize", model, tmp_path / "out", *options)
    assert status == 0, stderr
    assert "--calibration with text of your own domain is better" in " ".join(stdout.split())
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"]["text"] == "embedded"
    assert 1 <= report["calibration"]["windows"] < 128


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe", "gpt2"])
def test_every_matrix_on_disk_finds_its_error(tmp_path, text, name) -> None:
    """Experts in stacks or one by one under other names, and transposed matrices."""
    model = save_tiny(name, tmp_path / "model", torch.bfloat16)
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64, "group_size": 64}
    report = llmq.quantize(model, tmp_path / "out", calibration=str(text), **settings)
    *layers, others = inspect_checkpoint(tmp_path / "out")
    assert all(layer.error is not None for layer in layers)
    assert not others.quantized
    weights = sum(N * K for N, K in (layer["shape"] for layer in report["layers"]))
    assert sum(layer.weights for layer in layers) == weights
    assert report["bits_per_weight"] == pytest.approx(4 + 16 / 64, abs=0.02)


def test_token_ids_calibrate_too(model, tmp_path) -> None:
    ids = torch.randint(0, 384, (4, 64), generator=torch.Generator().manual_seed(0))
    report = llmq.quantize(
        model, tmp_path / "out", calibration=ids, samples=4, seq_len=64, group_size=64
    )
    assert report["calibration"]["text"] == "token ids (4, 64)"
    with pytest.raises(llmq.LlmqError, match="the model knows 0 to 383"):
        llmq.quantize(
            model, tmp_path / "b", calibration=ids + 9, samples=4, seq_len=64, group_size=64
        )


def test_help_is_quick_and_teaches() -> None:
    """Counted in calls, 300,000 of which took 0.2 seconds: a clock would judge the machine."""
    code = (
        "import cProfile, sys\n"
        "profile = cProfile.Profile()\n"
        "profile.enable()\n"
        "from llmq.cli import main\n"
        "for command in ([], ['quantize'], ['eval'], ['generate'], ['inspect'], ['demo']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "    if not command: profile.disable()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "calls = sum(entry.callcount for entry in profile.getstats())\n"
        "assert calls < 750_000, calls"
    )
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("Which method?", "Which bits?", "Examples", "llmq demo", "--skip", "wikitext"):
        assert word in done.stdout


def test_demo_compares_every_method(run, tmp_path, text, monkeypatch) -> None:
    """With a tiny random model in place of the embedded one."""
    tiny = save_tiny("llama", tmp_path / "model", torch.bfloat16, max_position_embeddings=256)
    monkeypatch.setattr(demo, "model_path", lambda: tiny)
    monkeypatch.setattr(demo, "calibration_path", lambda: text)
    monkeypatch.setattr(demo, "evaluation_path", lambda: text)
    monkeypatch.setattr(showcase, "BITS", (4,))
    monkeypatch.setattr(showcase, "WINDOWS", 8)
    status, stdout, stderr = run("demo", "--out", tmp_path / "out", "--json")
    assert status == 0, stderr
    trials = json.loads(stdout.splitlines()[-1])["trials"]
    assert [trial["label"] for trial in trials] == ["full precision"] + [
        f"{method} 4-bit g64" for method in ("rtn", "gptq", "awq", "balanced")
    ]
    assert all(trial["kl"] > 0 for trial in trials[1:])
    assert all(4 < trial["bits_per_weight"] < 4.5 for trial in trials[1:5])
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"{method}-4bit" for method in ("awq", "balanced", "gptq", "rtn")
    ]
    assert "perplexity" in stderr


def test_a_missing_demo_model_is_one_clear_error(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "model_path", lambda: tmp_path / "nothing")
    status, _, stderr = run("demo")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "reinstall" in stderr
