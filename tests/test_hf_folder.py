"""What is in the folder of a packed checkpoint beside its tensors, and how they are called."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from hf_cases import (
    ASYMMETRIC,
    SYMMETRIC,
    assert_same_tensors,
    logits,
    packed,
    read_config,
    round_to_nearest,
    tensors,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq import hf


def test_the_original_config_text_and_files_are_kept(packed_llama, tmp_path):
    _, saved = packed_llama
    source = saved.parent / "source"
    config = read_config(saved)
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert list(config.items()) == list(read_config(source).items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(saved)("miller").input_ids[0] == 0


def test_old_style_configs_and_chat_templates_survive(packed_llama, tmp_path):
    model, _ = packed_llama
    source = tmp_path / "source"
    zoo.save_tiny("llama", source, torch.float32)
    old = {**read_config(source), "torch_dtype": "float32", "rope_theta": 10000.0, "mine": [1]}
    del old["dtype"]
    (source / "config.json").write_text(json.dumps(old))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "notes.txt").write_text("not ours")
    out = hf.save(model, tmp_path / "out", source=source)
    config = read_config(out)
    assert config.pop("quantization_config")
    # The scales are bfloat16; a config that said otherwise would change them on loading.
    assert config == {**old, "torch_dtype": "bfloat16"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tool.jinja").exists()
    assert not (out / "notes.txt").exists()
    assert torch.equal(logits(hf.load(out)), logits(model))


def test_no_local_path_is_written(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "secret-source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    round_to_nearest(model, SYMMETRIC)
    tokenizer = AutoTokenizer.from_pretrained(source)
    outs = [
        hf.save(model, tmp_path / "a", source=source),
        hf.save(model, tmp_path / "b", tokenizer=tokenizer),
    ]
    for path in (path for out in outs for path in out.iterdir()):
        data = path.read_bytes()
        assert b"secret-source" not in data, path
        assert str(tmp_path).encode() not in data, path


def test_keys_follow_a_source_without_the_base_prefix(tmp_path):
    """The published GPT-2 has `h.0.attn...`, not `transformer.h.0.attn...`."""
    source = zoo.save_tiny("gpt2", tmp_path / "source", torch.bfloat16)
    bare = {k.removeprefix("transformer."): v for k, v in tensors(source).items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source)
    round_to_nearest(model, ASYMMETRIC)
    saved = hf.save(model, tmp_path / "out", source=source)
    keys = set(tensors(saved))
    assert "h.0.attn.c_attn.weight_packed" in keys
    assert not any(key.startswith("transformer.") for key in keys)
    assert torch.equal(logits(hf.load(saved)), logits(model))


def test_gpt2_weights_are_written_like_those_of_a_linear(tmp_path):
    saved = tensors(hf.save(packed("gpt2"), tmp_path / "a"))
    assert saved["transformer.h.0.attn.c_attn.weight_shape"].tolist() == [384, 128]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_and_their_index(name, tmp_path):
    model = packed(name)
    whole = tensors(hf.save(model, tmp_path / "one"))
    out = hf.save(model, tmp_path / "many", max_shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert all(key in load_file(out / file) for key, file in index["weight_map"].items())
    assert all(path.stat().st_size < 220_000 for path in out.glob("model-*.safetensors"))
    assert_same_tensors(tensors(out), whole)
    assert torch.equal(logits(hf.load(out)), logits(model))
