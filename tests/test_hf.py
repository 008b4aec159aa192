"""Packed checkpoints in transformers: what is saved comes back.

Oracles: the quantized model in memory (logits and tensors, bit for bit); the independent
`compressed-tensors` package behind stock transformers, in a process that never imports llmq.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from hf_cases import (
    ASYMMETRIC,
    SYMMETRIC,
    assert_same_tensors,
    groups,
    logits,
    packed,
    read_config,
    round_to_nearest,
    tensors,
    with_packed_head,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmq import hf
from llmq.errors import SchemeError
from llmq.nn import PackedExperts, PackedLinear, packed_modules, prepare
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN

# Stock transformers 5.23 with compressed-tensors 0.20 cannot load these. It leaves GPT-2's Conv1D
# and gpt-oss's stacked experts random, and its own Falcon code fails on any packed checkpoint.
NOT_STOCK = ("gpt2", "falcon", "gpt_oss")
ROUTERS = (".gate.weight", ".router.weight")


# Every architecture: memory -> disk -> memory


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_saved_and_loaded_logits_are_bit_identical(name, scheme, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    round_to_nearest(model, scheme)
    # Backends may treat few rows differently, so one short and one long input.
    expected = logits(model), logits(model, zoo.tiny_ids(1, 5))
    saved = hf.save(model, tmp_path / "a", source=source)

    loaded = AutoModelForCausalLM.from_pretrained(saved)
    kinds = [type(module) for _, module in packed_modules(loaded)]
    assert kinds == [type(module) for _, module in packed_modules(model)]
    assert (PackedExperts in kinds) == (name in ("mixtral", "qwen3_moe", "gpt_oss"))
    assert [n for n, m in loaded.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    assert torch.equal(logits(loaded), expected[0])
    assert torch.equal(logits(loaded, zoo.tiny_ids(1, 5)), expected[1])
    assert all(not p.requires_grad for _, m in packed_modules(loaded) for p in m.parameters())

    written, originals = tensors(saved), set(tensors(source))
    suffixes = ("_packed", "_scale", "_shape", *([] if scheme.symmetric else ["_zero_point"]))
    stems = {key.removesuffix("_packed") for key in written if key.endswith("_packed")}
    assert stems <= originals
    assert set(written) == (originals - stems) | {stem + s for stem in stems for s in suffixes}
    ignored = read_config(saved)["quantization_config"]["ignore"]
    routers = {k.removesuffix(".weight") for k in originals if k.endswith(ROUTERS)}
    assert routers | {"lm_head"} <= set(ignored)

    loaded.save_pretrained(tmp_path / "b")
    files = {p.name for p in saved.iterdir()} - {"tokenizer.json", "tokenizer_config.json"}
    assert files == {p.name for p in (tmp_path / "b").iterdir()}
    assert_same_tensors(written, tensors(tmp_path / "b"))
    assert read_config(saved) == read_config(tmp_path / "b")


STOCK = """
import sys, torch, zoo
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        torch.save(model(zoo.tiny_ids(seed=1)).logits, folder + "/stock.pt")
assert "compressed_tensors" in sys.modules and "llmq" not in sys.modules
"""


def test_stock_transformers_computes_the_same_logits(tmp_path):
    names = [name for name in zoo.ARCHITECTURES if name not in NOT_STOCK]
    expected = {}
    for name in names:
        model = packed(name, SYMMETRIC)
        hf.save(model, tmp_path / name)
        expected[name] = logits(prepare(model, "torch"))  # the arithmetic of the other package
    folders = [str(tmp_path / name) for name in names]
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", STOCK, *folders], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name in names:
        assert torch.equal(torch.load(tmp_path / name / "stock.pt"), expected[name]), name


# Schemes


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [("llama", b, g) for b in (2, 3, 4, 8) for g in (32, -1)]
    + [("qwen3_moe", 3, 64), ("qwen3_moe", 8, -1)],
)
def test_every_width_and_group_size(name, bits, group_size, tmp_path):
    model = packed(name, QuantScheme(bits, group_size))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_come_back_as_they_were(dtype, tmp_path):
    model = packed("llama", dtype=dtype)
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_dtype_given_at_load_is_obeyed(name, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    loaded = hf.load(saved, dtype=torch.float32)
    floats = {p.dtype for p in loaded.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    expected = logits(hf.load(saved)).float()
    assert (logits(loaded) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_mixed_schemes_and_skipped_layers(name, tmp_path):
    model = zoo.tiny_model(name, torch.bfloat16)
    skipped = Recipe(SYMMETRIC, RTN(), skip=("layers.0.self_attn.q_proj", "layers.1.*"))
    list(quantize(model, [zoo.tiny_ids()], skipped))
    list(quantize_block(model, 1, QuantScheme(8, 64)))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    schemes = {n: getattr(m, "scheme", None) for n, m in packed_modules(model)}
    assert {n: getattr(m, "scheme", None) for n, m in packed_modules(loaded)} == schemes
    assert len(set(schemes.values()) - {None}) == 2
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)
    assert torch.equal(logits(loaded), logits(model))


def quantize_block(model: PreTrainedModel, index: int, scheme: QuantScheme):
    """Round the attention of one block, whose experts, if any, stay dense."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = model.model.layers[index].self_attn.get_submodule(name)
        W = linear.weight.detach()
        q = RTN().solve(W, torch.eye(W.shape[1]), scheme)
        setattr(model.model.layers[index].self_attn, name, PackedLinear.from_quantized(q))
        yield name


# The head


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_quantized_head_tied_or_not(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    round_to_nearest(model, SYMMETRIC)
    with_packed_head(model, SYMMETRIC)
    saved = hf.save(model, tmp_path / "a", source=source)
    loaded = hf.load(saved)
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)
    assert isinstance(loaded.get_input_embeddings(), nn.Embedding)
    assert torch.equal(logits(loaded), logits(model))
    config = read_config(saved)
    assert config["quantization_config"]["ignore"] == []
    assert any("re:.*" in t for g in groups(config) for t in g["targets"])
    if zoo.ARCHITECTURES[name].tie_word_embeddings:
        assert config["tie_word_embeddings"] is False
    loaded.save_pretrained(tmp_path / "b")
    assert_same_tensors(tensors(saved), tensors(tmp_path / "b"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # untied, tied
def test_a_head_rounded_while_loading_can_be_saved(name, bits, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    model = hf.load(saved, head_bits=bits)
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.scheme.bits == bits
    plain = logits(hf.load(saved))
    assert 0 < (logits(model) - plain).norm() < (0.02 if bits == 8 else 0.3) * plain.norm()
    again = hf.load(hf.save(model, tmp_path / "b"))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SchemeError, match="bits=7"):
        hf.load(saved, head_bits=7)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_model_fused_while_loading_is_saved_as_it_was(name, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    model = hf.load(saved, fuse=True)
    fused = [n for n, m in packed_modules(model) if "fused" in str(m)]
    assert len(fused) == {"llama": 10, "mixtral": 6, "gpt2": 0}[name]
    plain = logits(hf.load(saved))
    assert (logits(model) - plain).norm() <= 1e-2 * plain.norm()
    assert_same_tensors(tensors(saved), tensors(hf.save(model, tmp_path / "b")))
    model.save_pretrained(tmp_path / "c")
    assert_same_tensors(tensors(saved), tensors(tmp_path / "c"))
    assert torch.equal(logits(hf.load(tmp_path / "c")), plain)


def test_packing_more_after_loading_is_saved(packed_llama, tmp_path):
    model = with_packed_head(hf.load(packed_llama[1]))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert isinstance(loaded.lm_head, PackedLinear)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_what_was_loaded_gives_the_same_folder(packed_llama, tmp_path):
    _, saved = packed_llama
    again = hf.save(hf.load(saved), tmp_path / "again", source=saved)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in saved.iterdir())
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_tied_embeddings_are_written_once(tmp_path):
    saved = hf.save(packed("qwen3"), tmp_path / "a")
    assert "lm_head.weight" not in tensors(saved)
    loaded = hf.load(saved)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
