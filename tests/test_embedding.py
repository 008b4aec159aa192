"""Input embeddings with one byte per weight.

Oracles: the quantized model in memory; the dequantized table; the independent compressed-tensors
package, alone and behind stock transformers in a process that never imports llmq.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from test_stream import TEXT, assert_same_checkpoint, in_memory
from torch import nn
from transformers import AutoModelForCausalLM

from llmq import api, hf
from llmq.bench import bytes_per_step
from llmq.card import model_card
from llmq.convert import convert
from llmq.decode import cache_bytes, static_cache
from llmq.errors import FormatError, OutputError, SchemeError
from llmq.formats import bytewise, compressed_tensors
from llmq.gguf_file import FILE, write_gguf
from llmq.ladder import QUALITIES
from llmq.nn import PackedEmbedding
from llmq.quantize import Recipe, quantize
from llmq.refine import Answers
from llmq.scheme import QuantScheme
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.stored import inspect_checkpoint
from llmq.stream import Streamed
from llmq.tuning import ScaleTuning

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, -1, False)
OLDER = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
OPTIONS: dict[str, Any] = {
    "method": "rtn",
    "group_size": 32,
    "samples": 4,
    "seq_len": 64,
    "device": "cpu",
    "calibration": TEXT,
    "embeddings": 8,
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(zoo.tiny_ids(seed=1)).logits


def packed(source: Path, scheme: QuantScheme = SYMMETRIC, **recipe: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source)
    recipe = {"lm_head": True, **recipe}
    list(quantize(model, [zoo.tiny_ids()], Recipe(scheme, RTN(), embeddings=8, **recipe)))
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    source = zoo.save_tiny("llama", root / "source", torch.bfloat16)
    api.quantize(source, root / "packed", **OPTIONS)
    return root / "packed"


# The module and its tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_rows_are_those_of_the_table(dtype, symmetric, group_size):
    scheme = QuantScheme(8, group_size, symmetric)
    W = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[7] = 0
    layer = PackedEmbedding.from_embedding(nn.Embedding.from_pretrained(W, padding_idx=1), scheme)
    table = layer.quantized().dequantize()
    assert layer.rows(torch.tensor([7])).count_nonzero() == 0
    step = layer.weight_scale.float().repeat_interleave(64 // layer.weight_scale.shape[1], 1)
    slack = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert ((table.float() - W.float()).abs() <= step * 0.51 + slack * W.float().abs()).all()
    for ids in (torch.tensor([[3, 0, 49], [7, 7, 1]]), torch.tensor([2]), torch.tensor(5)):
        assert torch.equal(layer(ids), table[ids])
        assert layer(ids).dtype == dtype
    assert torch.equal(layer.dense()(torch.arange(50)), table)

    # the other package, from and to the same tensors
    stated = compressed_tensors.config({}, [], {scheme: ["embed"]})["config_groups"]["group_0"]
    theirs = QuantizationScheme.model_validate(stated)
    written = bytewise.write("", layer.quantized())
    decoded = IntQuantizationCompressor.decompress(dict(written), theirs)["weight"]
    assert torch.equal(decoded, table)
    read = bytewise.read("", written, scheme)
    assert torch.equal(read.dequantize(), table)
    assert torch.equal(read.codes, layer.quantized().codes)


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class ByPosition(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + input.unsqueeze(-1)


def test_subclasses_run_their_own_forward_or_are_refused():
    scheme = QuantScheme(8, -1, True)
    layer = PackedEmbedding.from_embedding(Scaled(20, 64, padding_idx=15), scheme)
    ids = torch.tensor([[3, 15, 0, 3]])
    expected = 3 * layer.quantized().dequantize()[ids]
    assert torch.equal(layer(ids), expected)
    assert torch.equal(copy.deepcopy(layer)(ids), expected)
    run = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(run(ids), expected)
    assert torch.equal(layer.dense()(ids), expected)
    with pytest.raises(SchemeError, match="ByPosition does more with token ids"):
        PackedEmbedding.from_embedding(ByPosition(20, 64), scheme)
    with pytest.raises(SchemeError, match="8 bits and a group size that divides 64"):
        PackedEmbedding(QuantScheme(4, -1), nn.Embedding(20, 64))


# Whole models


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "opt", "gpt2", "gpt_neox", "falcon", "qwen3_moe"]
)
def test_saved_and_loaded_logits_are_bit_identical(name, scheme, tmp_path):
    """qwen3, gemma3, opt, gpt2 and falcon are tied; gemma3 scales its rows."""
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = packed(source, scheme)
    saved = hf.save(model, tmp_path / "a", source=source)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    table = loaded.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in table.parameters())
    written = tensors(saved)
    [key] = [k for k, t in written.items() if t.dtype == torch.int8 and k.endswith(".weight")]
    assert key in tensors(source)
    assert config(saved).get("tie_word_embeddings") is not True
    loaded.save_pretrained(tmp_path / "b")
    if name == "qwen3_moe" and OLDER:
        return  # until then transformers drops dimensions of size one when it takes a stack apart
    assert (saved / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert config(saved) == config(tmp_path / "b")

    dense = AutoModelForCausalLM.from_pretrained(saved)
    name = next(n for n, m in dense.named_modules() if m is dense.get_input_embeddings())
    table = dense.get_submodule(name)
    assert isinstance(table, PackedEmbedding)
    dense.set_submodule(name, table.dense())
    assert isinstance(dense.get_input_embeddings(), nn.Embedding)
    assert torch.equal(logits(dense), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = packed(source, ASYMMETRIC)
    loaded = hf.load(hf.save(model, tmp_path / "a", source=source))
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    assert torch.equal(logits(loaded), logits(model))


STOCK = """
import sys, torch, zoo
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    # Made from the config if it is "missing": compressed-tensors turns the buffer into a parameter.
    assert info.pop("missing_keys") <= {"model.embed_tokens.embed_scale"}, folder
    assert not any(info.values()), (folder, info)
    assert model.get_input_embeddings().weight.dtype == torch.int8
    with torch.no_grad():
        torch.save(model(zoo.tiny_ids(seed=1)).logits, folder + "/stock.pt")
assert "compressed_tensors" in sys.modules and "llmq" not in sys.modules
"""


def test_stock_transformers_computes_the_same_logits(tmp_path):
    expected = {}
    for name in ("llama", "qwen3", "gemma3", "opt", "gpt_neox"):
        source = zoo.save_tiny(name, tmp_path / "source" / name, torch.bfloat16)
        hf.save(packed(source), tmp_path / name, source=source)
        expected[name] = logits(hf.load(tmp_path / name, backend="torch"))
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parent)}
    folders = [str(tmp_path / name) for name in expected]
    run = subprocess.run(
        [sys.executable, "-c", STOCK, *folders], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name, wanted in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "stock.pt"), wanted), name


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_files_to_files_gives_what_memory_gives_and_what_was_planned(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "model", torch.bfloat16)
    options = OPTIONS | {"method": "gptq", "group_size": 64, "lm_head": name != "llama"}
    report = api.quantize(source, tmp_path / "a", **options)
    scheme = QuantScheme(4, 64, symmetric=True)
    recipe = Recipe(scheme, GPTQ(), lm_head=name != "llama", embeddings=8)
    assert_same_checkpoint(tmp_path / "a", in_memory(source, tmp_path / "b", recipe))

    given = ("method", "group_size", "lm_head", "embeddings")
    plan = api.plan(source, **{key: options[key] for key in given})
    assert plan.output_bytes == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert plan.bits_per_weight == pytest.approx(report["bits_per_weight"], abs=1e-9)
    verdicts = {engine.name: engine.loads for engine in plan.engines}
    assert verdicts["stock transformers"] is (name != "gpt2")
    assert verdicts["vLLM"] is verdicts["SGLang"] is False


def test_half_on_disk_and_other_dtypes(tmp_path):
    source = zoo.save_tiny("gemma3", tmp_path / "source", torch.bfloat16)
    saved = hf.save(packed(source), tmp_path / "a", source=source)
    expected = logits(hf.load(saved))
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    split = hf.load(saved, device_map=places, offload_folder=tmp_path / "offload")
    assert split.get_input_embeddings().weight.is_meta
    assert torch.equal(logits(split), expected)
    wide = hf.load(saved, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters() if p.is_floating_point()} == {torch.float32}
    assert (logits(wide) - expected).norm() < 0.02 * expected.norm()
    ids = zoo.tiny_ids(1, 5)
    made = hf.load(saved).generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 9)


# Around it


def test_report_inspection_card_and_page(llama, run):
    report = json.loads((llama / "quantization_report.json").read_text())
    assert report["embeddings"] == 8
    entry = report["layers"][-1]
    assert (entry["name"], entry["shape"], entry["bits"]) == (
        "model.embed_tokens",
        [zoo.VOCAB, 128],
        8,
    )
    assert 0 < entry["error"] < 1e-4
    rows = {row.name: row for row in inspect_checkpoint(llama)}
    row = rows["model.embed_tokens"]
    assert (row.scheme, row.shape, row.weights) == ("int8 g32 symmetric", (384, 128), 384 * 128)
    assert row.bytes == 384 * 128 * (8 + 16 / 32) / 8
    assert row.error == entry["error"]
    assert rows["(6 others)"].weights == 384 * 128 + 5 * 128  # output layer and norms
    card = model_card(report, "me/model")
    assert "input embeddings are rounded to nearest at 8 bits" in card
    assert "vllm serve" not in card
    assert "--embeddings 8" in report["command"]
    assert run("verify", llama)[0] == 0


def test_bytes_of_a_decoding_step(llama):
    model = hf.load(llama)
    cache = static_cache(model, 8)
    with torch.no_grad():
        model(zoo.tiny_ids(1, 5), past_key_values=cache, use_cache=True)
    whole = sum(p.nbytes for p in model.parameters())
    table = sum(p.nbytes for p in model.get_input_embeddings().parameters())
    row = 128 + 128 // 32 * 2
    for batch in (1, 3):
        assert bytes_per_step(model, cache, batch) == whole - table + batch * row + cache_bytes(
            cache
        )


def test_other_layouts(llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    convert(llama, tmp_path / "same", "compressed-tensors")
    assert torch.equal(logits(hf.load(tmp_path / "same")), logits(hf.load(llama)))
    for target in ("gptq", "awq"):
        with pytest.raises(SchemeError, match=r"quantized embeddings\. Use --format compressed"):
            convert(llama, tmp_path / target, target)
    done = write_gguf(llama, tmp_path / "gguf")
    assert "embeddings were quantized; their values are in f16 now" in done.notes
    [found] = [
        t
        for t in gguf.GGUFReader(tmp_path / "gguf" / FILE).tensors
        if t.name == "token_embd.weight"
    ]
    table = hf.load(llama).get_input_embeddings().quantized().dequantize()
    assert torch.equal(torch.from_numpy(found.data.copy()), table.half())


def test_scales_are_tuned_towards_the_original_with_everything_rounded(tmp_path, monkeypatch):
    """Not towards that with a rounded output layer and embeddings, which are packed by then."""
    quick = ScaleTuning(steps=2, every=1)
    monkeypatch.setitem(QUALITIES, "best", replace(QUALITIES["best"], scales=quick))
    source = zoo.save_tiny("llama", tmp_path / "model", torch.bfloat16)
    options = {**OPTIONS, "method": None, "quality": "best", "samples": 12, "bits": 2}
    seen = []
    answer = Answers.__call__
    monkeypatch.setattr(Answers, "__call__", lambda *a: seen.append((a, answer(*a))) or seen[-1][1])
    report = api.quantize(source, tmp_path / "out", lm_head=True, **options)
    assert report["scale_tuning"]["steps"] == 2
    (answers, batch, rows), found = seen[0]
    full = AutoModelForCausalLM.from_pretrained(source)(answers._batches[batch][rows]).logits
    assert (found - full).norm() < 0.02 * full.norm()


# Errors


def test_what_cannot_be_done_is_refused(tmp_path, refused):
    source = zoo.save_tiny("qwen3", tmp_path / "tied")
    assert "--lm-head" in refused(source, "--embeddings", "8")
    assert "use 8" in refused(source, "--embeddings", "4", "--lm-head")
    assert "--lm-head" in refused(source, "--embeddings", "8", "--lm-head", "--skip", "lm_head")
    model = zoo.tiny_model("llama")
    model.set_input_embeddings(nn.EmbeddingBag(384, 128))
    with pytest.raises(SchemeError, match=r"EmbeddingBag is no nn\.Embedding"):
        list(quantize(model, [zoo.tiny_ids()], Recipe(SYMMETRIC, RTN(), embeddings=8)))


def test_a_stopped_run_goes_on_with_the_same_embeddings_only(tmp_path, monkeypatch):
    source = zoo.save_tiny("llama", tmp_path / "model", torch.bfloat16)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Streamed, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(source, tmp_path / "out", **OPTIONS)
    other: dict[str, Any] = {**OPTIONS, "embeddings": None}
    with pytest.raises(OutputError, match="embeddings"):
        api.quantize(source, tmp_path / "out", **other)
    api.quantize(source, tmp_path / "out", **OPTIONS)
    api.quantize(source, tmp_path / "peace", **OPTIONS)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "peace")


def change(folder: Path, out: Path, drop: str = "", **stated: Any) -> Path:
    """A copy without some tensor, or with another quantization_config."""
    shutil.copytree(folder, out)
    kept = {key: tensor for key, tensor in tensors(folder).items() if key != drop}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    found = config(folder)
    found["quantization_config"] |= stated
    (out / "config.json").write_text(json.dumps(found))
    return out


def test_damaged_checkpoints_are_refused(llama, tmp_path):
    with pytest.raises(FormatError, match=r"embed_tokens\.weight_scale: missing"):
        hf.load(change(llama, tmp_path / "a", "model.embed_tokens.weight_scale"))
    with pytest.raises(FormatError, match=r"embed_tokens\.weight is missing"):
        hf.load(change(llama, tmp_path / "b", "model.embed_tokens.weight"))
    groups = config(llama)["quantization_config"]["config_groups"]
    wrong = copy.deepcopy(groups)
    wrong["group_1"]["targets"] = ["lm_head"]
    with pytest.raises(FormatError, match="Linear is no embedding"):
        hf.load(change(llama, tmp_path / "c", config_groups=wrong))
    wrong = copy.deepcopy(groups)
    wrong["group_1"]["weights"]["group_size"] = 64
    with pytest.raises(FormatError, match="weight_scale"):
        hf.load(change(llama, tmp_path / "d", config_groups=wrong))
    table = {k.rpartition(".")[2]: v for k, v in tensors(llama).items() if "embed" in k}
    scheme = QuantScheme(8, 32, True)
    with pytest.raises(FormatError, match="weight_scale is torch"):
        bytewise.read("", {**table, "weight_scale": table["weight_scale"][:, :1]}, scheme)
    with pytest.raises(FormatError, match="weight_zero_point is missing"):
        bytewise.read("", table, replace(scheme, symmetric=False))


def test_linear_layers_with_one_byte_per_weight_are_left_to_others():
    written = compressed_tensors.config({}, [], {QuantScheme(8, 32, True): ["Linear"]})
    with pytest.raises(FormatError, match="int-quantized"):
        compressed_tensors.parse_config(written)
    written["config_groups"]["group_0"]["targets"] = ["re:.*embed_tokens"]
    with pytest.raises(FormatError, match="int-quantized"):
        compressed_tensors.parse_config(written)
