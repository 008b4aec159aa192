"""Bad input gets one clear line, a status that is not 0, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, short_files
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config
from zoo import save_tiny, tiny_tokenizer

from llmq import pipeline


def damaged(model: Path, folder: Path, change) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_paths(refused, text, tmp_path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing", "--calibration", text)
    assert "holds no config.json" in refused(text.parent, "--calibration", text)
    assert "a file" in refused(text, "--calibration", text)


def test_a_calibration_file_that_is_missing_empty_or_short(refused, model, text, tmp_path) -> None:
    assert "no such file" in refused(model, "--calibration", tmp_path / "no.txt")
    (tmp_path / "empty.txt").touch()
    assert "0 tokens found" in refused(model, "--calibration", tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("The old miller leaves.")
    line = refused(model, "--calibration", tmp_path / "short.txt")
    count = len(tiny_tokenizer()("The old miller leaves.", add_special_tokens=False)["input_ids"])
    assert f"found {count} tokens, need 252 (4 windows of 63)" in line  # and BOS in each
    assert "context of 128" in refused(model, "--calibration", text, "--seq-len", "129")


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_what_is_no_causal_model(refused, text, tmp_path, kind) -> None:
    folder = tmp_path / kind
    if kind == "t5":
        T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1).save_pretrained(folder)
    else:
        sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        BertForMaskedLM(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
    assert "not a causal language model" in refused(folder, "--calibration", text)


def test_a_config_that_cannot_be_read(refused, text, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json cannot be used" in refused(tmp_path / "model", "--calibration", text)


def test_a_missing_tokenizer(refused, model, text, tmp_path) -> None:
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in refused(tmp_path / "model", "--calibration", text)


def test_a_group_that_does_not_divide_lists_layers_and_what_would(refused, model, text) -> None:
    line = refused(model, "--calibration", text, "--group-size", "128")
    assert "model.layers.0.mlp.down_proj (in_features=192)" in line
    assert "model.layers.1.mlp.down_proj (in_features=192)" in line
    assert "q_proj" not in line  # in_features=128
    assert "group_size=64 or 32 or -1" in line
    assert "--skip 'mlp.down_proj'" in line


def test_number_formats_that_do_not_exist(refused, model, text) -> None:
    assert "bits=7: use one of 2, 3, 4, 5, 6, 8" in refused(model, "--bits", "7")
    assert "group_size=96: use one of" in refused(model, "--group-size", "96")
    assert "nothing is left to quantize" in refused(model, "--calibration", text, "--skip", "*")


def test_a_weight_that_is_not_finite_is_named_before_calibration(
    refused, model, text, tmp_path, monkeypatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = float("inf")

    def never(*_: object) -> None:
        raise AssertionError("calibration has started")

    monkeypatch.setattr(pipeline, "quantize", never)
    folder = damaged(model, tmp_path / "model", change)
    line = refused(folder, "--calibration", text)
    assert f"{name}: 1 of 24576 values are NaN or infinite" in line


def test_weights_that_are_missing_damaged_or_of_another_shape(
    refused, model, text, tmp_path
) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    missing = damaged(model, tmp_path / "missing", lambda tensors: tensors.pop(key))
    assert key in refused(missing, "--calibration", text)
    other = damaged(model, tmp_path / "b", lambda t: t.update({key: t[key][:5].clone()}))
    line = refused(other, "--calibration", text)
    assert f"{key} has shape (5, 128), but config.json says (192, 128)" in line
    cut = tmp_path / "c"
    shutil.copytree(model, cut)
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:9000])
    assert "damaged" in refused(cut, "--calibration", text)


def test_a_model_that_is_quantized_already(refused, run, model, text, tmp_path) -> None:
    run("quantize", model, tmp_path / "once", "--method", "rtn", "--calibration", text, *QUICK)
    assert "already quantized" in refused(tmp_path / "once", "--calibration", text)


def test_an_output_folder_that_is_not_empty(refused, model, text, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    line = refused(model, "--calibration", text, out=tmp_path / "full")
    assert "not empty" in line
    assert (tmp_path / "full" / "file").read_text() == "precious"


def test_a_disk_that_is_full(refused, model, text) -> None:
    """The operating system refuses to let a file grow, as a full disk or a quota does."""
    with short_files(20_000):
        line = refused(model, "--calibration", text)
    assert "cannot be written" in line


def test_ctrl_c_leaves_nothing(run, model, text, tmp_path, monkeypatch) -> None:
    whole = pipeline.quantize

    def interrupted(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    status, _, stderr = run("quantize", model, tmp_path / "out", "--calibration", text, *QUICK)
    assert status == 130
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "a", "b", "--no-such-option"],
        ["quantize", "a", "b", "--method", "magic"],
        ["quantize", "a", "b", "--quality", "gptq"],
        ["quantize", "a", "b", "--bits", "four"],
        ["quantize", "a"],
        ["frobnicate"],
        ["eval", "a", "--join", "magic"],
    ],
)
def test_wrong_usage_is_status_2(run, arguments) -> None:
    status, _, stderr = run(*arguments)
    assert status == 2
    assert "Traceback" not in stderr


def test_a_quality_and_a_method_at_once(refused, model, text) -> None:
    options = ("--calibration", text, "--quality", "fast", "--method", "rtn")
    assert "give one of the two" in refused(model, *options)


def test_a_device_that_is_not_there(refused, model, text) -> None:
    assert "cannot be used" in refused(model, "--calibration", text, "--device", "nonsense")
    assert "cannot be used" in refused(model, "--calibration", text, "--device", "cuda")


def test_eval_and_generate_name_their_mistakes(run, model, text, tmp_path) -> None:
    for arguments, message in (
        (["eval", tmp_path / "none"], "no such folder"),
        (["eval", model, "--text", text, "--seq-len", "500"], "context of 128"),
        (["eval", model, "--text", text, "--windows", "100000"], "tokens, need 12800000"),
        (["inspect", tmp_path], "not a folder with config.json"),
        (["generate", model, "--prompt", "Hi", "--chat"], "no chat template"),
    ):
        status, _, stderr = run(*arguments)
        assert (status, stderr.count("\n")) == (1, 1)
        assert message in stderr


def test_half_of_the_experts_cannot_be_skipped(refused, text, tmp_path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    line = refused(tmp_path / "model", "--calibration", text, "--skip", "down_proj")
    assert "Skip both (--skip 'experts.*') or none" in line
