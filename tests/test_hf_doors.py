"""Packed checkpoints through transformers' own doors: pipeline, generate, push, `LlmqConfig`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hf_cases import (
    ASYMMETRIC,
    SYMMETRIC,
    assert_same_tensors,
    change_config,
    logits,
    packed,
    read_config,
    tensors,
)
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, GenerationConfig, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig
from transformers.utils import hub
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmq import hf
from llmq.errors import FormatError, SchemeError, SourceError
from llmq.formats import compressed_tensors
from llmq.nn import PackedLinear, packed_modules
from llmq.scheme import QuantScheme

# Half on disk: what a machine with too little memory does.
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


# transformers' own doors


def test_import_of_llmq_does_not_import_transformers():
    code = "import sys, llmq; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pipeline_keeps_weights_packed(packed_llama):
    _, saved = packed_llama
    generate = pipeline("text-generation", model=str(saved), device="cpu")
    assert any(packed_modules(generate.model))
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=1)
    text = generate("the old miller", generation_config=greedy)[0]["generated_text"]
    assert text.startswith("the old miller")


def test_generate_with_static_cache_and_compile(tmp_path):
    model = hf.load(hf.save(packed("llama", num_hidden_layers=1), tmp_path / "a"))
    ids = zoo.tiny_ids(1, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    options["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    compiled: Any = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled.mode = None  # an option of inductor, which would take a minute here
    compiled._compile_all_devices = True
    static = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, expected)
    assert model.hf_quantizer.is_compileable


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_device_map_cpu_and_disk_offload(name, tmp_path):
    # float32, where offloaded layers and the others take the same path.
    model = packed(name, dtype=torch.float32)
    saved = hf.save(model, tmp_path / "a")
    expected = logits(model)
    assert torch.equal(logits(hf.load(saved, device_map="auto")), expected)
    split = hf.load(saved, device_map=SPLIT, offload_folder=tmp_path / "offload")
    held = {n: next(m.parameters()).is_meta for n, m in packed_modules(split)}
    assert all(on_meta == n.startswith("model.layers.1.") for n, on_meta in held.items())
    assert torch.equal(logits(split), expected)
    with pytest.raises(SourceError, match="offloaded"):
        hf.save(split, tmp_path / "b")


def test_push_to_hub_uploads_what_save_pretrained_writes(packed_llama, monkeypatch):
    """Only the network calls are replaced."""
    _, saved = packed_llama
    uploaded = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    def upload_folder(self, *, folder_path, **kwargs):
        for path in Path(folder_path).iterdir():
            uploaded[path.name] = path.read_bytes()

    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    hf.load(saved).push_to_hub("someone/tiny")
    assert {"config.json", "model.safetensors"} <= set(uploaded)
    config = json.loads(uploaded["config.json"])
    assert config["quantization_config"] == read_config(saved)["quantization_config"]


def test_dequantize_gives_a_dense_model_with_the_same_logits(packed_llama):
    _, saved = packed_llama
    loaded = hf.load(saved)
    expected = logits(loaded)
    dense = loaded.dequantize()
    assert not any(packed_modules(dense))
    assert torch.equal(logits(dense), expected)


def test_attach_makes_save_pretrained_write_a_packed_checkpoint(tmp_path):
    model = packed("mixtral")
    hf.attach(model)
    model.save_pretrained(tmp_path / "a")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(hf.save(model, tmp_path / "b")))
    assert torch.equal(logits(hf.load(tmp_path / "a")), logits(model))


# On the fly


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_quantizing_while_loading_equals_quantizing_in_memory(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(bits=4, group_size=32, symmetric=False)
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model = packed(name, ASYMMETRIC)
    assert [n for n, _ in packed_modules(loaded)] == [n for n, _ in packed_modules(model)]
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "a")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(hf.save(model, tmp_path / "b")))
    assert torch.equal(logits(hf.load(tmp_path / "a")), logits(model))


def test_on_the_fly_skips_what_it_is_told_and_takes_the_head_if_told(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(8, -1, True, skip=("*.down_proj", "q_proj"), lm_head=True)
    loaded = hf.load(source, quantization_config=config)
    dense = {n.rpartition(".")[2] for n, m in loaded.named_modules() if isinstance(m, nn.Linear)}
    assert dense == {"down_proj", "q_proj"}
    assert isinstance(loaded.lm_head, PackedLinear)
    assert loaded.lm_head.scheme == QuantScheme(8, -1, True)


def test_on_the_fly_with_offload(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(4, 32)
    loaded = hf.load(
        source, quantization_config=config, device_map=SPLIT, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(loaded), logits(packed("llama")))


def test_on_the_fly_refuses_a_group_that_does_not_divide(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source")
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.down_proj.*192.*group_size=64"):
        hf.load(source, quantization_config=hf.LlmqConfig(4, 128))
    tied = zoo.save_tiny("qwen3", tmp_path / "tied")
    with pytest.raises(SchemeError, match="tied"):
        hf.load(tied, quantization_config=hf.LlmqConfig(4, 64, lm_head=True))


# Takeover


def test_other_compressed_tensors_checkpoints_go_where_they_went_before(tmp_path):
    model = zoo.tiny_model("llama", torch.bfloat16)
    own, quantized = model.state_dict(), {}
    for key, W in own.items():
        if key.endswith("_proj.weight"):
            scale = (W.float().abs().amax(1, keepdim=True) / 127).bfloat16()
            codes = (W.float() / scale.float()).round().clamp(-128, 127)
            quantized |= {key: codes.to(torch.int8), f"{key}_scale": scale}
            own[key] = (codes.bfloat16() * scale).bfloat16()
        else:
            quantized[key] = W.clone()
    model.save_pretrained(tmp_path)
    save_file(quantized, tmp_path / "model.safetensors", metadata={"format": "pt"})
    channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    w8a8 = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": channel, "input_activations": token}
        },
    }
    change_config(tmp_path, quantization_config=w8a8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(packed_modules(loaded))
    assert type(loaded.hf_quantizer).__module__.startswith("transformers.")
    model.load_state_dict(own)
    difference = logits(loaded).float() - logits(model).float()
    assert difference.norm() < 0.05 * logits(model).float().norm()  # activations are int8 there


@pytest.mark.parametrize(
    "change",
    [
        {"format": "float-quantized"},
        {"format": "nvfp4-pack-quantized"},
        {"format": "marlin-24"},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_which_configs_are_ours(change):
    ours = compressed_tensors.config({SYMMETRIC: ["Linear"]}, ["lm_head"])
    assert isinstance(AutoQuantizationConfig.from_dict(ours), hf.LlmqConfig)
    for group in ours["config_groups"].values():
        del group["format"]
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].previous is (
        CompressedTensorsConfig
    )
    with pytest.raises(FormatError):
        compressed_tensors.parse_config(ours | change)


def test_no_private_method_reaches_the_disk(packed_llama, tmp_path):
    _, saved = packed_llama
    loaded = hf.load(saved)
    loaded.config.save_pretrained(tmp_path / "c")
    for folder in (saved, tmp_path / "c"):
        config = read_config(folder)["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
    assert AutoConfig.from_pretrained(saved).quantization_config["format"] == "pack-quantized"
