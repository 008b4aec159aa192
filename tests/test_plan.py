"""`llmq plan`: sizes against what is really written, problems against what is really refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from zoo import ARCHITECTURES, save_tiny

from llmq import api, plan
from llmq.errors import SchemeError, SourceError
from llmq.hf.outline import outline, stored_bytes
from llmq.hf.saving import save
from llmq.quantize import Recipe, quantizable
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN
from llmq.stored import Header, tensor_headers


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_size_is_exact(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "model")
    scheme = {"bits": 4, "group_size": 32, "symmetric": False, "skip": ["o_proj"]}
    report = api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", **scheme)
    found = api.plan(tmp_path / "model", **scheme)
    assert found.output_bytes == written(tmp_path / "out")
    assert found.source_bytes == sum(
        header.nbytes for header in tensor_headers(tmp_path / "model").values()
    )
    assert found.bits_per_weight == pytest.approx(report["bits_per_weight"], abs=1e-9)


@pytest.mark.parametrize("bits", [8, 3, 2])
@pytest.mark.parametrize("lm_head", [False, True])
def test_output_size_is_exact_in_every_format(bits: int, lm_head: bool, tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "model")
    scheme = {"bits": bits, "group_size": -1, "lm_head": lm_head}
    api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", **scheme)
    assert api.plan(tmp_path / "model", **scheme).output_bytes == written(tmp_path / "out")


def test_size_of_shards_and_their_index(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32)
    model = api.load(tmp_path / "out")
    save(model, tmp_path / "shards", source=tmp_path / "model", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    known = set(tensor_headers(tmp_path / "model"))
    assert stored_bytes(model.to("meta"), known, "100kB") == written(tmp_path / "shards")


def big_llama() -> tuple[LlamaConfig, dict[str, Header]]:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = outline(config, torch.bfloat16)
    return config, {
        name: Header("BF16", tuple(p.shape), p.nbytes) for name, p in model.named_parameters()
    }


def test_seventy_billion_weights_are_planned_without_reading_one() -> None:
    config, headers = big_llama()
    found = plan.make("70B", config, headers, Recipe(QuantScheme()), ranks=(1, 2, 4, 8))
    assert found.parameters == 70_553_706_496
    assert found.matrices == 560
    assert 37e9 < found.output_bytes < 40e9
    assert not found.problems
    [disk] = plan.disk_problems(".", 10**18)
    assert disk.fatal


def test_what_several_gpus_cannot_share() -> None:
    config, _ = big_llama()
    config.intermediate_size, config.num_hidden_layers = 28672 // 8 * 8 + 64, 1
    model = outline(config, torch.bfloat16)
    shapes = quantizable(model)
    recipe = Recipe(QuantScheme(4, 64, True))
    assert not plan.parallel_problems(model, shapes, recipe, 1)
    [problem] = plan.parallel_problems(model, shapes, recipe, 2)
    assert "down_proj: each holds 14368 inputs, no multiple of the group 64" in problem.what
    assert problem.fix == "--group-size 32"
    what = [p.what for p in plan.parallel_problems(model, shapes, recipe, 3)]
    assert any("8192 does not divide by 3" in text for text in what)


def test_problems_say_what_would_work(run, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    [problem] = api.plan(tmp_path / "model", group_size=128).problems
    assert problem.fatal
    assert "does not divide their 192 inputs" in problem.what
    assert "--group-size 64 or --group-size 32 or --group-size -1" in problem.fix
    with pytest.raises(SchemeError):
        api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=128)
    status, stdout, _ = run("plan", tmp_path / "model", "--json")
    assert status == 1
    assert json.loads(stdout.splitlines()[-1])["problems"][0]["fix"] == problem.fix
    status, stdout, _ = run("plan", tmp_path / "model", "--group-size", "32")
    assert status == 0
    assert "bits per quantized weight" in stdout
    assert run("plan", tmp_path / "model", "--tensor-parallel", "two")[0] == 2
    with pytest.raises(SourceError):
        api.plan(tmp_path / "nowhere" / "at" / "all")


def test_engines_follow_the_format() -> None:
    def verdicts(name: str, scheme: QuantScheme) -> dict[str, bool | None]:
        model = outline(ARCHITECTURES[name], torch.bfloat16)
        recipe = Recipe(scheme, RTN())
        return {e.name: e.loads for e in plan.engines(model, quantizable(model), recipe)}

    stock = "stock transformers"
    config, headers = big_llama()
    found = plan.make("70B", config, headers, Recipe(QuantScheme(4, 32, True)))
    assert all(engine.loads for engine in found.engines)
    assert verdicts("llama", QuantScheme(4, 32, True))["vLLM"] is None  # in_features=192
    assert verdicts("llama", QuantScheme(4, 32, False))[stock] is False
    assert verdicts("gpt2", QuantScheme(4, 32, True))[stock] is False
    assert verdicts("falcon", QuantScheme(4, 32, True))[stock] is False
    assert verdicts("llama", QuantScheme(3, 32, True))["SGLang"] is False
    assert verdicts("llama", QuantScheme(3, 32, True))["vLLM"] is None
