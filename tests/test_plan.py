"""`llmq plan`: sizes against what is really written, problems against what is really refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from zoo import ARCHITECTURES, save_tiny, tiny_text

from llmq import adapters, api, machine, needs, outlook, plan
from llmq.errors import MemoryLimitError, OutputError, SchemeError, SourceError
from llmq.hf.outline import outline, stored_bytes
from llmq.hf.saving import save
from llmq.ladder import METHODS, QUALITIES
from llmq.operations import operations
from llmq.quantize import Recipe, quantizable
from llmq.scheme import QuantScheme
from llmq.sizes import Group, Job, Shape
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


@pytest.mark.parametrize(
    "book", [{"codebook": "nf4"}, {"codebook": "learned", "bits": 3, "outliers": 0.02}]
)
def test_output_size_is_exact_with_code_books(book: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "model")
    api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32, **book)
    found = api.plan(tmp_path / "model", method="rtn", group_size=32, **book)
    assert found.output_bytes == written(tmp_path / "out")
    assert [engine.loads for engine in found.engines] == [True, False, False, False, False]
    with pytest.raises(SchemeError, match="one width for all layers"):
        api.plan(tmp_path / "model", method="rtn", mixed=True, **book)


def test_output_size_is_exact_with_k_quants(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=320, head_dim=64)
    api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", k_quants=True)
    found = api.plan(tmp_path / "model", method="rtn", k_quants=True)
    assert found.output_bytes == written(tmp_path / "out")
    assert "do not divide down_proj (320 inputs)" in found.problems[0].what
    assert not found.problems[0].fatal


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_size_of_shards_and_their_index(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "model")
    api.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32)
    model = api.load(tmp_path / "out")
    save(model, tmp_path / "shards", source=tmp_path / "model", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    known = set(tensor_headers(tmp_path / "model"))
    assert stored_bytes(model.to("meta"), known, "100kB") == written(tmp_path / "shards")


def big_llama(layers: int = 80) -> tuple[LlamaConfig, dict[str, Header]]:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
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
    assert all(problem.where == "disk" for problem in found.problems)  # 40 GB may be missing here
    [disk] = plan.disk_problems(".", 10**18)
    assert disk.fatal


GIB = 1 << 30


def job_of(recipe: Recipe, windows: int = 128, lean: bool = False) -> Job:
    return outlook.job(recipe, windows, 512, lean, scan=False)


def peak(shape: Shape, job: Job) -> int:
    return max(phase.on_device + phase.on_host for phase in needs.memory(shape, job))


def test_shapes_of_blocks_and_of_experts() -> None:
    config, _ = big_llama()
    found = outlook.shape(outline(config, torch.bfloat16), Recipe())
    assert found.blocks == 80
    assert found.block_bytes == 855_654_400 * 2
    assert found.rest_bytes == 2 * (2 * 128256 * 8192 + 8192)
    q, o, up, down = found.groups
    assert (q.rows, q.widest, q.columns) == (8192 + 2 * 1024, 8192, 8192)
    assert (o.rows, o.columns) == (8192, 8192)
    assert (up.rows, up.widest, up.columns) == (2 * 28672, 28672, 8192)
    assert (down.rows, down.columns) == (8192, 28672)
    assert [g.matrices for g in found.groups] == [3, 1, 2, 1]
    scanning = next(
        p for p in needs.memory(found, Job(0, 512, 512, "gptq", scan=True)) if p.name == "scanning"
    )
    assert scanning.device["second moments"] == 80 * 4 * (6 * 8192**2 + 28672**2)
    config = ARCHITECTURES["qwen3_moe"]
    *_, up, down = outlook.shape(outline(config, torch.float32), Recipe()).groups
    assert (up.experts, up.active, up.rows, up.columns) == (4, 2, 2 * 64, 128)
    assert (down.experts, down.active, down.rows, down.columns) == (4, 2, 128, 64)


def test_memory_of_seventy_billion_weights() -> None:
    """One Hessian of the widest layer has 3.3 GB; GPTQ holds one more square of that size."""
    config, _ = big_llama()
    shape = outlook.shape(outline(config, torch.bfloat16), Recipe(), "cuda")
    square = 4 * 28672**2
    gptq = job_of(METHODS["gptq"])
    solving = max(needs.memory(shape, gptq), key=lambda phase: phase.on_device)
    assert solving.name == "solving"
    assert solving.device["second moments"] == square
    tall = 2 * 28672 * 8192
    assert square + tall < solving.device["solver"] < square + 5 * tall
    states = 128 * 512 * 8192 * 2
    assert solving.device["hidden states"] == states
    assert peak(shape, gptq) < 24 * GIB
    assert peak(shape, job_of(METHODS["gptq"], lean=True)) == peak(shape, gptq) - 2 * states
    more = peak(shape, job_of(METHODS["gptq"], 256))
    assert more == peak(shape, gptq) + 2 * states
    assert peak(shape, job_of(QUALITIES["balanced"])) > peak(shape, gptq) + 2 * square
    longer = dataclasses.replace(shape, blocks=160)
    assert peak(longer, gptq) == peak(shape, gptq)
    assert peak(shape, dataclasses.replace(gptq, scan=True)) > 140e9  # the whole model


def test_processes_share_text_and_work() -> None:
    config, _ = big_llama()
    shape = outlook.shape(outline(config, torch.bfloat16), Recipe())
    recipe = QUALITIES["balanced"]
    alone, each = (
        outlook.job(recipe, 128 // n, 512, False, scan=False, processes=n) for n in (1, 4)
    )
    assert peak(shape, each) < peak(shape, alone)
    before, after = operations(shape, alone), operations(shape, each)
    assert before["model"] / 4 < after["model"] < before["model"] / 2
    # Every process makes the factor of H for its own rows.
    assert before["float64"] / 4 < after["float64"] < before["float64"]
    assert Group(96, 32, 64).share(4) == Group(24, 24, 64)
    assert Group(96, 32, 64, experts=9, active=2).share(4).experts == 3


def test_work_grows_with_blocks_and_text() -> None:
    config, _ = big_llama()
    shape = outlook.shape(outline(config, torch.bfloat16), Recipe())
    one, two = (
        operations(s, job_of(METHODS["gptq"]))
        for s in (shape, dataclasses.replace(shape, blocks=160))
    )
    assert all(two[kind] <= 2 * one[kind] for kind in one)
    assert two["float64"] == 2 * one["float64"]
    # A forward pass takes two operations per weight and token; more than one is made.
    assert one["model"] > 2 * 128 * 512 * 68e9
    speeds = machine.speeds("cpu", torch.bfloat16)
    assert speeds.keys() == one.keys()
    assert all(0 < seconds < 1e-3 for seconds in speeds.values())


def test_what_this_machine_has(tmp_path: Path) -> None:
    """Memory that is taken is missed; the disk of a folder that is not there is its parent's."""
    before, free = machine.resident_bytes(), machine.free_memory("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert machine.resident_bytes() - before > 0.9 * block.nbytes
    assert free is None or 0 < free < 10**15
    there = shutil.disk_usage(tmp_path).total
    assert 0 < machine.free_disk(tmp_path / "not" / "there") < there


def test_what_does_not_fit_is_refused_and_what_would_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, headers = big_llama(4)
    free = {"memory": 23 * GIB, "disk": 10**13}
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: True)
    monkeypatch.setattr(machine, "free_memory", lambda device: free["memory"])
    monkeypatch.setattr(machine, "free_disk", lambda folder: free["disk"])

    def problems(recipe: Recipe) -> list[plan.Problem]:
        job = job_of(dataclasses.replace(recipe, scheme=QuantScheme()))
        made = plan.make("70B", config, headers, recipe, out=tmp_path / "out", job=job, timed=False)
        return list(made.problems)

    assert not problems(METHODS["gptq"])
    assert [p.fix for p in problems(QUALITIES["balanced"])] == ["--activations disk"]
    free["memory"] = 25 * GIB
    assert [p.fix for p in problems(QUALITIES["best"])] == ["--tune-scales 0"]
    free["memory"] = 16 * GIB
    [memory] = problems(QUALITIES["balanced"])
    assert (memory.where, memory.fatal) == ("memory", True)
    assert "too few" in memory.what
    assert memory.fix == "--activations disk --quality fast"
    free["memory"] = 2 * GIB
    assert problems(METHODS["gptq"])[0].fix == "a machine with more memory"
    free |= {"memory": 10**13, "disk": 10**10}
    [disk] = problems(METHODS["gptq"])
    assert disk.where == "disk"
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "part").open("wb") as file:
        file.truncate(10**10)  # sparse; it will be used again
    assert not problems(METHODS["gptq"])
    # So does a run, before it begins.
    save_tiny("llama", tmp_path / "model")
    free["memory"] = 1 << 20
    with pytest.raises(MemoryLimitError, match=r"memory: about .* too few\. Use "):
        api.quantize(tmp_path / "model", tmp_path / "new", group_size=64, device="cpu")
    free |= {"memory": None, "disk": 1 << 10}  # type: ignore[dict-item]
    with pytest.raises(OutputError, match=r"disk: .* too few"):
        api.quantize(tmp_path / "model", tmp_path / "new", group_size=64, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.partial"}


def test_an_average_of_bits(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    found = api.plan(tmp_path / "model", bits=3.5, group_size=64, device="cpu")
    report = api.quantize(
        tmp_path / "model",
        tmp_path / "out",
        bits=3.5,
        group_size=64,
        calibration=[tiny_text(300)],
        samples=4,
        seq_len=48,
        device="cpu",
    )
    assert found.bits_per_weight == pytest.approx(report["bits_per_weight"], abs=0.1)
    assert found.output_bytes == pytest.approx(written(tmp_path / "out"), rel=0.02)
    with pytest.raises(SchemeError, match="an average lies between"):
        api.plan(tmp_path / "model", bits=1.5)


def test_quantize_says_beforehand_what_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = machine.speeds("cpu", torch.float32)
    monkeypatch.setattr(machine, "speeds", lambda *_: dict.fromkeys(kinds, 1e-12))
    source, lines = save_tiny("llama", tmp_path / "model"), []
    api.quantize(source, tmp_path / "out", method="rtn", group_size=64, tell=lines.append)
    [line] = lines
    assert re.fullmatch(
        r"model: [\d.]+ MB become [\d.]+ kB; it takes about [\d.]+ [MG]B of memory, "
        r"[\d.]+ MB of disk, 0:08 of time",
        line,
    )


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
    assert verdicts("gpt2", QuantScheme(4, 32, True))["llama.cpp"] is False
    assert verdicts("qwen2", QuantScheme(8, 32, False))["llama.cpp"] is False
