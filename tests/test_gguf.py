"""GGUF files against transformers' loader and the `gguf` package's reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_convert import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq import hf
from llmq.convert import open_checkpoint
from llmq.errors import SchemeError
from llmq.formats import gguf as layout
from llmq.gguf_file import FILE, write_gguf
from llmq.nn import packed_modules
from llmq.scheme import QuantScheme

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFReader, quants

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, 64, False)


def dequantized(folder: Path) -> Any:
    """The model that `folder` packs, dense and in float32."""
    model = hf.load(folder, dtype=torch.float32)  # products in float32, as llama.cpp takes them
    weights: dict[str, Any] = {name: packed.dequantize() for name, packed in packed_modules(model)}  # type: ignore[operator]
    dense: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "source", dtype=torch.float32)
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight
    return dense


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", SYMMETRIC),
        ("llama", ASYMMETRIC),
        ("llama", QuantScheme(8, -1, True)),
        ("mistral", SYMMETRIC),
        ("qwen2", QuantScheme(3, 64, False)),
    ],
)
def test_transformers_reads_the_file(name, scheme, tmp_path):
    packed = checkpoint(tmp_path, name, scheme)
    written = write_gguf(packed, tmp_path / "gguf")
    assert written.rounded_scales == 0
    kind = layout.block_type(scheme, 256)
    assert written.notes[0] == f"14 matrices in {kind}"
    assert list((tmp_path / "gguf").iterdir()) == [tmp_path / "gguf" / FILE]
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file=FILE, dtype=torch.float32
    )
    expected = dequantized(packed)
    if name == "mistral":
        expected.config.sliding_window = None  # not a part of llama.cpp's "llama"
        assert "sliding window" in str(written.notes)
    ids = zoo.tiny_ids(1, 8, seed=1)
    with torch.no_grad():
        found, wanted = read(ids).logits, expected(ids).logits
    tolerance = 1e-3 if kind == "Q4_1" else 1e-5  # fp16 embeddings hold tiny bf16 exactly
    assert (found - wanted).norm() < tolerance * wanted.norm()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=FILE)
    text = "The old miller follows two letters before dawn."
    assert tokenizer(text).input_ids[-8:] == zoo.tiny_tokenizer()(text).input_ids[-8:]


def test_qwen3_and_metadata(tmp_path):
    packed = checkpoint(tmp_path, "qwen3", SYMMETRIC)
    write_gguf(packed, tmp_path / "gguf")
    reader = GGUFReader(tmp_path / "gguf" / FILE)
    opened, config = open_checkpoint(packed), open_checkpoint(packed).config
    found = {tensor.name: tensor for tensor in reader.tensors}
    key = "model.layers.1.self_attn.q_proj"  # qwen3's rows stay as they are
    weight = quants.dequantize(found["blk.1.attn_q.weight"].data, GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.tensor(weight).bfloat16(), opened.read(key).dequantize())
    assert "output.weight" not in found  # tied
    assert found["blk.0.attn_q_norm.weight"].tensor_type == GGMLQuantizationType.F32
    assert len(found) == len(opened.dense()) + len(opened.schemes)

    def value(field: str):
        return reader.fields[field].contents()

    assert value("general.architecture") == "qwen3"
    assert value("qwen3.attention.key_length") == config["head_dim"]
    assert value("qwen3.rope.freq_base") == config["rope_parameters"]["rope_theta"]
    assert value("tokenizer.ggml.pre") == "gpt-2"
    assert value("tokenizer.ggml.add_bos_token") is True
    assert len(value("tokenizer.ggml.tokens")) == config["vocab_size"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_small_blocks_and_small_embeddings(name, tmp_path, run):
    sizes = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}
    packed = checkpoint(tmp_path, name, ASYMMETRIC, sizes)
    plain = write_gguf(packed, tmp_path / "plain")
    assert plain.notes[0] == "14 matrices in Q4_1"
    status, out, error = run(
        "convert", packed, tmp_path / "small", "--format", "gguf", "--k-quants",
        "--embeddings", "q6_k", "--json",
    )  # fmt: skip
    assert status == 0, error
    done = json.loads(out)
    assert done["rounded_scales"] == 0
    assert sorted(done["notes"][0].split(", ")) == [
        "12 matrices in Q4_K",
        "2 matrices in Q4_1",  # down_proj: 320 is no multiple of 256
        "2 matrices in Q6_K",
    ]
    assert "rounded to q6_k" in done["notes"][1]
    assert "rounded the scales of 12 matrices" in str(done["notes"])
    sizes = [(tmp_path / f / FILE).stat().st_size for f in ("small", "plain")]
    assert sizes[0] < 0.8 * sizes[1]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / f, gguf_file=FILE, dtype=torch.float32)
        for f in ("small", "plain")
    ]
    with torch.no_grad():
        found, wanted = (model(zoo.tiny_ids(1, 8, seed=1)).logits for model in models)
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_embeddings_that_do_not_fit_are_refused(tmp_path, run):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC)
    with pytest.raises(SchemeError, match=r"hidden_size=128 is not divisible by 256. Use q8_0"):
        write_gguf(packed, tmp_path / "gguf", embeddings="q6_k")
    status, _, error = run("convert", packed, tmp_path / "awq", "--format", "awq", "--k-quants")
    assert status == 1
    assert "--k-quants" in error
    assert not (tmp_path / "awq").exists()


def test_what_has_no_place_in_gguf_leaves_nothing(tmp_path, run):
    packed = checkpoint(tmp_path, "gemma2", SYMMETRIC)
    with pytest.raises(SchemeError, match="model_type='gemma2'"):
        write_gguf(packed, tmp_path / "gguf")
    llama = checkpoint(tmp_path / "llama", "llama", QuantScheme(8, 32, False))
    status, _, error = run("convert", llama, tmp_path / "gguf", "--format", "gguf")
    assert status == 1
    assert "no block holds asymmetric 8 bits" in error
    assert not (tmp_path / "gguf").exists()
    assert not list(tmp_path.glob(".*"))
