"""`llmq bench`: what it counts, and that it measures what it says."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from zoo import ARCHITECTURES, tiny_ids, tiny_model

from llmq import bench as module, demo, hf
from llmq.bench import (
    bench,
    bytes_per_step,
    held_bytes,
    prepare_for_decoding,
    read_bandwidth,
    seconds,
)
from llmq.decode import cache_bytes, static_cache
from llmq.errors import LlmqError, SourceError
from llmq.fuse import head_scheme
from llmq.nn import PackedLinear
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The embedded model, rounded to 4 bits."""
    model = hf.load(demo.model_path())
    list(quantize(model, [tiny_ids()], Recipe(QuantScheme(4, 32, True), RTN())))
    folder = tmp_path_factory.mktemp("bench") / "packed"
    return hf.save(model, folder, source=demo.model_path())


def test_the_command_sets_the_model_beside_its_original(run, packed, monkeypatch) -> None:
    monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e10)
    options = ["--batch", "1,2", "--prompt", "8,100000", "--tokens", "4", "--repeats", "2"]
    status, stdout, stderr = run(
        "bench", packed, "--reference", demo.model_path(), *options, "--head-bits", 8, "--json"
    )
    assert status == 0, stderr
    assert stdout.count("\n") == 1
    found = json.loads(stdout)
    assert found["left_out"] == [100000]
    assert found["bandwidth"] == 1e10
    rows = found["rows"]
    assert [(r["model"], r["batch"], r["prompt"]) for r in rows] == [
        ("packed", 1, 8), ("packed", 2, 8), ("reference", 1, 8), ("reference", 2, 8),
    ]  # fmt: skip
    for row in rows:
        step = row["batch"] / row["decode_tokens_per_s"]
        assert row["of_roof"] == pytest.approx(row["bytes_per_step"] / found["bandwidth"] / step)
        assert 0 < row["of_roof"] < 2
        assert row["prefill_tokens_per_s"] > 0
    assert rows[0]["bytes_per_step"] < 0.5 * rows[2]["bytes_per_step"]
    assert rows[0]["mode"] == "eager"
    status, stdout, _ = run("bench", packed, *options)
    assert status == 0
    assert "1 x 8" in stdout
    assert "original" not in stdout
    assert "prompts of 100000 tokens" in stdout


def test_prompts_that_do_not_fit_and_bad_numbers(run, packed) -> None:
    with pytest.raises(SourceError, match="do not fit its context"):
        bench(str(packed), prompts=[10**6], batches=[1], tokens=1)
    status, _, stderr = run("bench", packed, "--batch", "1;2")
    assert status == 2
    assert "positive numbers with commas" in stderr
    with pytest.raises(LlmqError):
        bench(str(packed.parent / "nothing"), prompts=[8], batches=[1], tokens=1)


def numbers(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def test_bytes_of_a_dense_model_are_its_weights_but_for_the_embedding() -> None:
    model: Any = tiny_model("llama", torch.bfloat16)  # not tied
    cache = static_cache(model, 40)
    with torch.no_grad():
        model(tiny_ids(3, 5), past_key_values=cache, use_cache=True)
    V, D = model.get_input_embeddings().weight.shape
    heads, layers, width = 2, 2, 32
    expected = 2 * (numbers(model) - V * D + 3 * D)
    expected += 2 * (2 * layers * 3 * heads * 40 * width)  # keys and values
    assert bytes_per_step(model, cache, 3) == expected


def test_a_tied_embedding_is_read_as_the_head() -> None:
    model: Any = tiny_model("qwen3", torch.bfloat16)
    cache = static_cache(model, 8)
    with torch.no_grad():
        model(tiny_ids(1, 5), past_key_values=cache, use_cache=True)
    D = model.get_input_embeddings().weight.shape[1]
    assert bytes_per_step(model, cache, 1) == 2 * numbers(model) + 2 * D + cache_bytes(cache)


def test_of_stacked_experts_only_those_chosen_are_read() -> None:
    model: Any = tiny_model("qwen3_moe", torch.bfloat16)
    config = model.config
    cache = static_cache(model, 8)
    with torch.no_grad():
        model(tiny_ids(1, 5), past_key_values=cache, use_cache=True)
    E, top_k = config.num_experts, config.num_experts_per_tok
    experts = sum(p.nbytes for p in model.parameters() if p.ndim == 3)
    assert top_k < E
    one, all_of_them = (bytes_per_step(model, cache, B) for B in (1, 100))
    rows = 2 * model.config.hidden_size
    embedding = model.get_input_embeddings().weight.nbytes
    assert all_of_them - one == experts * (E - top_k) // E + min(100 * rows, embedding) - rows


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_packed_layers_count_as_they_are_stored(name) -> None:
    dense: Any = tiny_model(name, torch.bfloat16)
    model: Any = tiny_model(name, torch.bfloat16)
    list(quantize(model, [tiny_ids()], Recipe(QuantScheme(4, 32, True), RTN())))
    caches = []
    for m in (dense, model):
        caches.append(static_cache(m, 8))
        with torch.no_grad():
            m(tiny_ids(1, 5), past_key_values=caches[-1], use_cache=True)
    saved = bytes_per_step(dense, caches[0], 100) - bytes_per_step(model, caches[1], 100)
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear)
    )
    weights += sum(
        m.num_experts * N * K for m in model.modules() for N, K in getattr(m, "shapes", {}).values()
    )
    assert saved == pytest.approx(weights * (2 - 4.5 / 8), rel=2e-3)  # weight_shape is read too


def test_held_bytes_count_every_storage_once() -> None:
    model: Any = tiny_model("llama", torch.bfloat16)
    assert held_bytes(model) == 2 * numbers(model) + sum(b.nbytes for b in model.buffers())
    list(quantize(model, [tiny_ids()], Recipe(QuantScheme(4, 32, True), RTN())))
    before = held_bytes(model)
    prepare_for_decoding(model, None)
    assert any("fused" in str(m) for m in model.modules())
    assert held_bytes(model) == pytest.approx(before, rel=0.01)  # the parts are views


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_prepared(name) -> None:
    model: Any = tiny_model(name, torch.bfloat16)
    list(quantize(model, [tiny_ids()], Recipe(QuantScheme(4, 32, True), RTN())))
    prepare_for_decoding(model, 4)
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.scheme == head_scheme(head.in_features, 4)


def test_seconds_are_those_of_the_clock() -> None:
    start = time.perf_counter()
    each = seconds(lambda: time.sleep(0.01), torch.device("cpu"), times=3)
    assert 3 * 0.0099 < 3 * each < time.perf_counter() - start


def test_bandwidth_is_that_of_the_fastest_sum_or_copy(monkeypatch) -> None:
    cpu, calls = torch.device("cpu"), []
    real = read_bandwidth(cpu, 1 << 24)

    def timed(call: Any, device: torch.device) -> float:
        calls.append(call())
        return [0.5, 0.3, 0.4, 0.2, 0.6, 0.7, 0.3, 0.9, 0.8, 0.9][len(calls) - 1]

    monkeypatch.setattr(module, "seconds", timed)
    assert read_bandwidth(cpu, 1 << 24) == (1 << 24) / (0.3 / 2)
    assert [found.numel() for found in calls] == [1] * 5 + [1 << 22] * 5
    assert 1e7 < real < 1e13
