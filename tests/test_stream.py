"""From files to files, one block at a time: the same tensors as in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import ARCHITECTURES, save_tiny, tiny_text, tiny_tokenizer

from llmq import hf
from llmq.api import quantize as to_folder
from llmq.calibrate import token_windows
from llmq.errors import FormatError
from llmq.hf.streaming import StoredModel
from llmq.ladder import QUALITIES
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.gptq import GPTQ
from llmq.source import open_model
from llmq.verify import CHECKSUMS

OPTIONS: dict[str, Any] = {
    "method": "gptq",
    "group_size": 64,
    "samples": 4,
    "seq_len": 64,
    "device": "cpu",
}
TEXT = [tiny_text(300)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def in_memory(source: Path, out: Path, recipe: Recipe) -> Path:
    """The same with a model object and `hf.save`."""
    model = open_model(str(source))
    windows = token_windows(TEXT, tiny_tokenizer(), seq_len=64, samples=4, seed=0, bos=True)
    list(quantize(model, windows.split(1), recipe))
    return hf.save(model, out, source=source)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    found, expected = tensors(a), tensors(b)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    assert (a / "config.json").read_text() == (b / "config.json").read_text()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_files_to_files_gives_what_memory_gives(name, tmp_path):
    """Mixtures, Conv1D, tied embeddings, fused and per-expert keys among them."""
    source = save_tiny(name, tmp_path / "model", torch.bfloat16)
    to_folder(source, tmp_path / "a", calibration=TEXT, **OPTIONS)
    scheme = QuantScheme(4, 64, symmetric=True)
    assert_same_checkpoint(
        tmp_path / "a", in_memory(source, tmp_path / "b", Recipe(scheme, GPTQ()))
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_output_layer_and_smoothed_norms_too(name, tmp_path):
    """qwen3's output layer is tied to its embeddings."""
    source = save_tiny(name, tmp_path / "model")
    options = OPTIONS | {"method": "awq+gptq", "lm_head": True, "symmetric": False}
    before = (source / "model.safetensors").read_bytes()
    to_folder(source, tmp_path / "a", calibration=TEXT, activations="disk", **options)
    assert (source / "model.safetensors").read_bytes() == before  # norms are smoothed in memory
    recipe = Recipe(QuantScheme(4, 64), GPTQ(), AWQ(), lm_head=True)
    assert_same_checkpoint(tmp_path / "a", in_memory(source, tmp_path / "b", recipe))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_both_streams_of_hidden_states(name, tmp_path):
    source = save_tiny(name, tmp_path / "model")
    options = {key: value for key, value in OPTIONS.items() if key != "method"}
    to_folder(source, tmp_path / "a", calibration=TEXT, quality="balanced", **options)
    recipe = dataclasses.replace(QUALITIES["balanced"], scheme=QuantScheme(4, 64, symmetric=True))
    assert_same_checkpoint(tmp_path / "a", in_memory(source, tmp_path / "b", recipe))


def test_sharded_sources_and_disk_activations(tmp_path):
    source = save_tiny("mixtral", tmp_path / "model")
    whole = to_folder(source, tmp_path / "a", calibration=TEXT, **OPTIONS)
    model = open_model(str(source))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (source / "model.safetensors").unlink()
    assert len(list(source.glob("model-*.safetensors"))) > 5
    parts = to_folder(source, tmp_path / "b", calibration=TEXT, activations="disk", **OPTIONS)
    assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
    assert [x["error"] for x in parts["layers"]] == [x["error"] for x in whole["layers"]]


def sums(folder: Path) -> dict[str, str]:
    """File -> SHA-256, but "" for those that tell times."""
    timed = {f"quantization_{kind}" for kind in ("report.json", "report.html", "log.jsonl")}
    assert timed <= {path.name for path in folder.iterdir()}
    return {
        str(path.relative_to(folder)): ""
        if path.name in timed
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_bytes_every_time(tmp_path):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    for name in "ab":
        to_folder(source, tmp_path / name, calibration=TEXT, **OPTIONS)
    log = (tmp_path / "a" / "quantization_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log] == ["start", "block", "block", "end"]
    assert sums(tmp_path / "a") == sums(tmp_path / "b")


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 128}
NARROW = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (["--quality", "balanced"], NARROW),
        pytest.param(["--quality", "balanced"], WIDE, marks=pytest.mark.slow),
        pytest.param(["--method", "awq+gptq"], WIDE, marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_the_same_bytes_with_one_and_two_threads(
    options, sizes, run, text, set_threads, tmp_path
):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16, **sizes)
    shape = ["--samples", 12, "--seq-len", 128, "--group-size", 128, "--calibration", text]
    for count in (1, 2):
        set_threads(count)
        status, _, errors = run("quantize", source, tmp_path / str(count), *shape, *options)
        assert status == 0, errors
    found = sums(tmp_path / "1")
    assert {"model.safetensors", "config.json", "tokenizer.json", CHECKSUMS} <= found.keys()
    assert found == sums(tmp_path / "2")


def test_weights_are_there_only_while_they_are_used(tmp_path):
    source = StoredModel(save_tiny("qwen3", tmp_path / "model"))
    assert all(p.is_meta for p in source.model.parameters())
    assert not any(b.is_meta for b in source.model.buffers())
    assert not any(p.is_meta for p in source.block(1).parameters())
    head, embeddings = source.model.lm_head, source.model.model.embed_tokens
    with source.outer():
        assert not embeddings.weight.is_meta
        assert head.weight is embeddings.weight
        assert not source.model.model.norm.weight.is_meta
        assert all(p.is_meta for p in source.blocks.parameters())
    assert all(p.is_meta for p in source.model.parameters())
    assert head.weight is embeddings.weight


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    source = StoredModel(folder)
    source.block(0)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(FormatError, match="has changed"):
        source.block(1)


def test_the_config_is_free_of_local_paths(tmp_path):
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    to_folder(source, tmp_path / "a", calibration=TEXT, **OPTIONS)
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "a/config.json").read_text()))
