"""Packed checkpoints that are damaged, folders that cannot be written, models that are none."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import zoo
from conftest import short_files
from hf_cases import change_config, groups, read_config, tensors
from safetensors.torch import save_file

from llmq import hf
from llmq.errors import BackendError, FormatError, OutputError, SchemeError, SourceError
from llmq.nn import PackedLinear


def test_a_backend_that_is_not_there_or_cannot_run(packed_llama):
    _, saved = packed_llama
    loaded = hf.load(saved, backend="torch")
    names = {m.backend.name for m in loaded.modules() if isinstance(m, PackedLinear)}
    assert names == {"torch"}
    with pytest.raises(BackendError, match="use one of"):
        hf.load(saved, backend="abacus")
    with pytest.raises(BackendError, match=r"bfloat16|neither AVX2"):
        hf.load(saved, backend="cpu-int4", dtype=torch.float32)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        hf.load(tmp_path / "empty")


def test_a_model_that_is_not_a_causal_lm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(SourceError, match=r"clip.*not a causal language model"):
        hf.load(tmp_path)


@pytest.fixture
def copy(packed_llama, tmp_path) -> Path:
    model, _ = packed_llama
    return hf.save(model, tmp_path / "copy")


def test_a_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="damaged"):
        hf.load(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="weights cannot be read"):
        hf.load(copy)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight_scale", "model.norm.weight"])
def test_a_missing_tensor(copy, lost):
    rest = tensors(copy)
    del rest[lost]
    save_file(rest, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=lost.replace(".", r"\.") + ".*"):
        hf.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, "does not fit"),
        ({"group_size": 128}, "not divisible|does not fit"),
        ({"group_size": 64}, "does not fit"),
    ],
)
def test_a_config_that_contradicts_the_weights(copy, change, message):
    config = read_config(copy)
    groups(config)[0]["weights"] |= change
    change_config(copy, **config)
    with pytest.raises(FormatError, match=message):
        hf.load(copy)


def test_an_unknown_method(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "exl9"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"quant_method='exl9'.* compressed-tensors, gptq, awq"):
        hf.load(copy)


def test_a_config_that_forgets_a_packed_layer(copy):
    config = read_config(copy)
    groups(config)[0]["targets"] = ["re:.*self_attn.*"]
    change_config(copy, **config)
    with pytest.raises(FormatError, match=r"mlp\..*_packed is in the file, but no config group"):
        hf.load(copy)


def test_a_folder_in_the_way(packed_llama, tmp_path):
    model, _ = packed_llama
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="full: this folder is not empty"):
        hf.save(model, tmp_path / "full")
    with pytest.raises(OutputError, match="file: a file with this name exists"):
        hf.save(model, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert hf.save(model, tmp_path / "empty") == tmp_path / "empty"


def test_a_disk_that_is_full_leaves_nothing_behind(packed_llama, tmp_path):
    """A real failing write: the process may not write files of more than 64 KiB."""
    model, _ = packed_llama
    with short_files(65536), pytest.raises(OutputError, match="cannot be written"):
        hf.save(model, tmp_path / "new" / "deeper" / "out")
    assert list(tmp_path.iterdir()) == []


def test_any_failure_while_writing_leaves_nothing_behind(packed_llama, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    class Interrupted(Tokenizer):
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    model, _ = packed_llama
    with pytest.raises(OutputError, match="No space left"):
        hf.save(model, tmp_path / "out", tokenizer=Tokenizer())
    with pytest.raises(KeyboardInterrupt):
        hf.save(model, tmp_path / "out", tokenizer=Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_none(packed_llama, tmp_path):
    model, _ = packed_llama
    with pytest.raises(SourceError, match=r"has no config\.json"):
        hf.save(model, tmp_path / "out", source=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_quantized(tmp_path):
    with pytest.raises(SchemeError, match="no packed module"):
        hf.save(zoo.tiny_model("llama"), tmp_path / "out")
