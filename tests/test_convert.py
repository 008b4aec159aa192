"""Checkpoints in other layouts: converted, and loaded unmodified by transformers through llmq.

Oracles: the compressed-tensors twin, whose logits must be the same bit for bit, and plain readers
of GPTQ and AWQ tensors in tests/test_columns.py.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmq import hf
from llmq.convert import convert
from llmq.errors import FormatError, OutputError, SchemeError, SourceError
from llmq.formats import gptq
from llmq.nn import PackedExperts, PackedLinear, packed_modules
from llmq.opened import open_checkpoint
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN
from llmq.stored import inspect_checkpoint

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, 32, False)


def checkpoint(
    root: Path, name: str, scheme: QuantScheme, changes: dict[str, Any] | None = None, **recipe
) -> Path:
    source = zoo.save_tiny(name, root / "source", torch.bfloat16, **(changes or {}))
    model = AutoModelForCausalLM.from_pretrained(source)
    list(quantize(model, [zoo.tiny_ids()], Recipe(scheme, RTN(), **recipe)))
    return hf.save(model, root / "packed", source=source)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert any(True for _ in packed_modules(model))
    return model(zoo.tiny_ids(seed=1)).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def stated(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def write_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=[SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def llama(request, tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama", request.param)


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_there_and_back_gives_the_same_bytes(llama, target, tmp_path):
    done = convert(llama, tmp_path / "a", target)
    assert (done.modules, done.rounded_scales) == (14, 0)
    back = convert(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    assert (back.source, back.target, back.rounded_scales) == (target, "compressed-tensors", 0)
    original, returned = tensors(llama), tensors(tmp_path / "b")
    assert original.keys() == returned.keys()
    for key, tensor in original.items():
        assert tensor.dtype == returned[key].dtype, key
        assert torch.equal(tensor, returned[key]), key
    assert stated(tmp_path / "b") == stated(llama)
    names = {p.name for p in (tmp_path / "a").iterdir()} - {"quantize_config.json"}
    assert names == {p.name for p in llama.iterdir()}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("target", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_transformers_loads_what_was_converted(name, target, tmp_path):
    packed = checkpoint(tmp_path, name, ASYMMETRIC)
    convert(packed, tmp_path / "other", target)
    expected = logits(packed)
    assert torch.equal(logits(tmp_path / "other"), expected)
    model = hf.load(tmp_path / "other")
    kinds = {type(module) for _, module in packed_modules(model)}
    assert (PackedExperts in kinds) == (name in ("mixtral", "qwen3_moe"))
    assert PackedLinear in kinds
    # Whatever it was, it is saved as compressed-tensors.
    model.save_pretrained(tmp_path / "saved")
    assert stated(tmp_path / "saved")["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(tmp_path / "saved"), expected)
    written, original = tensors(tmp_path / "saved"), tensors(packed)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (8, -1), (8, 32)])
def test_gptq_holds_every_width(bits, group, tmp_path):
    packed = checkpoint(tmp_path, "llama", QuantScheme(bits, group, True))
    convert(packed, tmp_path / "gptq", "gptq")
    assert stated(tmp_path / "gptq")["checkpoint_format"] == "gptq"
    assert torch.equal(logits(tmp_path / "gptq"), logits(packed))
    with pytest.raises(SchemeError, match=r"AWQ holds 4 bits.* Use --format compressed-tensors"):
        convert(packed, tmp_path / "awq", "awq")
    assert not (tmp_path / "awq").exists()


def test_a_quantized_head_and_skipped_layers(tmp_path):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC, lm_head=True, skip=("layers.0.mlp.*",))
    for target in ("gptq", "awq"):
        convert(packed, tmp_path / target, target)
        assert torch.equal(logits(tmp_path / target), logits(packed))
        assert stated(tmp_path / target)["lm_head"] is True
    assert r"-:^model\.layers\.0\.mlp\.gate_up_proj$" in stated(tmp_path / "gptq")["dynamic"]
    assert "model.layers.0.mlp.down_proj" in stated(tmp_path / "awq")["modules_to_not_convert"]
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert torch.equal(logits(tmp_path / "back"), logits(packed))


def desc_act(folder: Path, out: Path) -> Path:
    """The same model with the inputs of its groups scattered, as `desc_act` leaves them."""
    convert(folder, out, "gptq")
    opened, found = open_checkpoint(out), tensors(out)
    version = gptq.version_of(opened.config["quantization_config"])
    for seed, name in enumerate(opened.schemes):
        expert = name.rpartition(".")[0] if ".experts." in name else str(seed)
        q = opened.read(name)
        generator = torch.Generator().manual_seed(zlib.crc32(expert.encode()))
        order = torch.randperm(q.shape[1], generator=generator)
        found |= gptq.write(name, replace(q, order=order), version)
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    write_config(out, desc_act=True)
    return out


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_desc_act_is_loaded_in_its_order(name, tmp_path):
    wild = desc_act(checkpoint(tmp_path, name, ASYMMETRIC), tmp_path / "wild")
    model = hf.load(wild, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    opened = open_checkpoint(wild)
    for module, packed in packed_modules(model):
        target = dense.get_submodule(module)
        if isinstance(packed, PackedLinear):
            q = opened.read(module)
            assert torch.equal(packed.dequantize(), replace(q, scale=q.scale.float()).dequantize())
            target.weight.data = packed.dequantize()
            continue
        assert isinstance(packed, PackedExperts)
        for index in range(packed.num_experts):
            for stack, layer in zip(
                ("gate_up_proj", "down_proj"), packed.expert(index), strict=True
            ):
                target.get_parameter(stack).data[index] = layer.dequantize()
    with torch.no_grad():
        ids = zoo.tiny_ids(seed=1)
        found, wanted = model(ids).logits, dense(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    twin = logits(tmp_path / "packed")  # the same weights, unscattered: not the same function
    assert (found - twin.float()).norm() > 0.1 * found.norm()
    assert not model.hf_quantizer.is_serializable()
    with pytest.raises(SchemeError, match="inputs are ordered"):
        hf.save(model, tmp_path / "no")
    for target in ("compressed-tensors", "awq"):
        with pytest.raises(SchemeError, match=r"desc_act.*Use --format gptq"):
            convert(wild, tmp_path / target, target)
    convert(wild, tmp_path / "again", "gptq")
    again, first = tensors(tmp_path / "again"), tensors(wild)
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_several_files(tmp_path):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC)
    convert(packed, tmp_path / "awq", "awq", max_shard_bytes=60_000)
    files = sorted(path.name for path in (tmp_path / "awq").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert torch.equal(logits(tmp_path / "awq"), logits(packed))
    convert(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    assert not list((tmp_path / "back").glob("*.index.json"))
    assert torch.equal(logits(tmp_path / "back"), logits(packed))


@pytest.mark.parametrize("target", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_inspect_knows_other_layouts(name, target, tmp_path, run):
    packed = checkpoint(tmp_path, name, SYMMETRIC, skip=("layers.0.self_attn.k_proj",))
    folder = tmp_path / target
    convert(packed, folder, target)
    ours, theirs = ({r.name: r for r in inspect_checkpoint(f)} for f in (packed, folder))
    assert {n: r.shape for n, r in ours.items()} == {n: r.shape for n, r in theirs.items()}
    stored = sum(tensor.nbytes for tensor in tensors(folder).values())
    assert sum(row.bytes for row in theirs.values()) == stored
    row = theirs["model.layers.1.self_attn.q_proj"]
    # AWQ's layout has zero points in any case.
    assert row.scheme == f"int4 g32 {'symmetric' if target == 'gptq' else 'asymmetric'}"
    assert row.bytes == 128 * 128 // 2 + 128 * 4 * (2 + 0.5) + (128 * 4 if target == "gptq" else 0)
    status, out, _ = run("inspect", folder, "--json")
    assert status == 0
    assert "model.layers.1.self_attn.q_proj" in out


def test_lost_scales_are_counted(tmp_path):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC)
    found = tensors(packed)
    found["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = 3.0e-6
    save_file(found, packed / "model.safetensors", metadata={"format": "pt"})
    done = convert(packed, tmp_path / "gptq", "gptq")
    assert done.rounded_scales == 1
    assert 0 < done.largest_change < 0.01


def test_bad_input_leaves_nothing(llama, tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    with pytest.raises(SourceError, match="not quantized"):
        convert(source, tmp_path / "out", "gptq")
    with pytest.raises(SchemeError, match="format='exl2'"):
        convert(llama, tmp_path / "out", "exl2")
    with pytest.raises(OutputError, match="not empty"):
        convert(llama, source, "gptq")
    convert(llama, tmp_path / "awq", "awq")
    write_config(tmp_path / "awq", group_size=64)
    with pytest.raises(FormatError, match="the weights disagree"):
        convert(tmp_path / "awq", tmp_path / "out", "compressed-tensors")
    with pytest.raises(FormatError, match="disagree"):
        hf.load(tmp_path / "awq")
    write_config(tmp_path / "awq", group_size=32, version="gemv")
    with pytest.raises(FormatError, match="version='gemv'"):
        convert(tmp_path / "awq", tmp_path / "out", "gptq")
    (tmp_path / "awq" / "model.safetensors").write_bytes(b"nothing")
    write_config(tmp_path / "awq", version="gemm")
    with pytest.raises(FormatError, match="damaged"):
        convert(tmp_path / "awq", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_command_line(llama, run, tmp_path):
    status, out, _ = run("convert", llama, tmp_path / "a", "--format", "awq", "--json")
    assert status == 0
    assert json.loads(out)["target"] == "awq"
    status, out, _ = run("convert", llama, tmp_path / "b", "--format", "gptq")
    assert status == 0
    assert "14 matrices, compressed-tensors to gptq; nothing was lost." in " ".join(out.split())
    status, _, error = run("convert", llama, tmp_path / "b", "--format", "gptq")
    assert status == 1
    assert error.startswith("llmq: ")
