"""What the kernels' host side hands to triton: with a driver that launches nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llmq_kernels import launch, layout, ops, plan, timing, tune
from llmq_kernels.dequant import dequantize_kernel
from llmq_kernels.gemm import linear_kernel

CPU = torch.device("cpu")
H200 = plan.Gpu("unknown", (9, 0), 132)


class Driver:
    """An sm_90 GPU, as far as a launch asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Any]]:
    """Launches, with what each would be compiled from; nothing is compiled."""
    seen: list[Any] = []

    def compile(source, target, options):
        def run(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            assert (target.arch, stream) == (90, 7)
            grid = (x, y, z)
            seen.append(SimpleNamespace(grid=grid, source=source, options=options, args=arguments))

        metadata = lambda *_: None  # noqa: E731
        return SimpleNamespace(run=run, launch_metadata=metadata, function=0, packed_metadata=())

    monkeypatch.setattr(triton.compiler, "compile", compile)
    kernels = (linear_kernel, dequantize_kernel)
    if not isinstance(linear_kernel, triton.JITFunction):
        pytest.skip("triton is interpreting")
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", Driver())
    yield seen
    for kernel in kernels:
        kernel.device_caches.clear()


def aligned(launched: Any) -> set[str]:
    """Arguments that the compiler may take for multiples of 16."""
    names = launched.source.fn.arg_names
    return {names[at] for (at,), attrs in launched.source.attrs.items() if attrs}


def test_a_launch_is_what_the_report_compiles(launches) -> None:
    """benchmarks/aot.py assumes these types and multiples; one binary serves 1 to 16 rows."""
    weight = tune.random_weight(512, 1024, 4, 128, True, CPU)
    for M in (1, 3, 16):
        x = torch.randn(M, 1024).bfloat16()
        chosen = plan.closed_form(H200, 4, 128, 512, 1024, M)
        launch.linear(x, weight, None, chosen)
    first = launches[0]
    assert first.grid == (512 // 64 // chosen.tiles, chosen.split, 1)
    pointers = {name for name in first.source.fn.arg_names if name.endswith("_ptr")}
    assert aligned(first) == pointers | {"N", "K", "stride_x"}
    types = {name: first.source.signature[name] for name in ("x_ptr", "s_ptr", "partial_ptr", "M")}
    assert types == {"x_ptr": "*bf16", "s_ptr": "*bf16", "partial_ptr": "*fp32", "M": "i32"}
    assert first.options["num_warps"] == chosen.warps
    assert first.options["num_stages"] == chosen.stages
    assert not first.options["launch_pdl"]
    assert all(launched.source is first.source for launched in launches)  # compiled once


def test_dependent_launches_experts_and_dequantizing_reach_the_driver(launches) -> None:
    x = torch.randn(5, 512).bfloat16()
    weight = tune.random_weight(70, 512, 4, 64, False, CPU)
    launch.linear(x, weight, torch.zeros(70).bfloat16(), plan.Plan(split=2, maxnreg=128), pdl=True)
    stacked = layout.stack([tune.random_weight(70, 512, 3, 64, False, CPU) for _ in range(4)])
    launch.linear_experts(x, stacked, torch.randint(0, 4, (5, 2)), plan.Plan())
    launch.dequantize(weight, torch.float16)
    dense, experts, whole = launches
    assert dense.options["launch_pdl"]
    assert dense.options["maxnreg"] == 128
    assert dense.grid == (2, 2, 1)
    assert "N" not in aligned(dense)  # 70
    assert dense.source.signature["z_ptr"] == "*u8"
    assert experts.grid == (2, 1, 4)
    assert whole.grid == (2, 4, 1)
    assert whole.source.signature["y_ptr"] == "*fp16"


def test_split_k_needs_a_counter_per_tile(launches) -> None:
    """More blocks of rows than counters: no split, rather than a counter of somebody else."""
    weight = tune.random_weight(64, 512, 4, 128, True, CPU)
    x = torch.randn(16 * 5, 512).bfloat16()
    for blocks in (4, 5):
        launch.linear(x[: 16 * blocks], weight, None, plan.Plan(split=2))
    assert weight.counters.numel() == plan.COUNTERS_PER_TILE == 4
    assert [launched.grid for launched in launches] == [(1, 2, 4), (1, 1, 5)]


@pytest.fixture
def tuned(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty folder of tables."""
    monkeypatch.setattr(plan, "TUNED", tmp_path)
    plan._table.cache_clear()
    yield tmp_path
    plan._table.cache_clear()


def test_a_tuned_table_answers_first(tuned) -> None:
    gpu = plan.Gpu("Made Up", (9, 0), 132)
    best = plan.Plan(2, 32, 1, 3, 8, 2, None)
    tune.save(gpu, {"4/128/4096/4096/32": best._asdict()}, tuned)
    tune.save(gpu, {"4/128/4096/4096/512": "dense"}, tuned)
    assert [path.name for path in tuned.iterdir()] == ["Made_Up.json"]

    def choose(rows: int, gpu: plan.Gpu = gpu) -> plan.Plan | None:
        return plan.choose(gpu, 4, 128, 4096, 4096, rows)

    assert choose(17) == choose(32) == best
    assert choose(257) is None
    assert choose(1) == plan.closed_form(gpu, 4, 128, 4096, 4096, 1)
    other = gpu._replace(capability=(8, 0))  # the same name is not the same GPU
    assert choose(32, other) == plan.closed_form(other, 4, 128, 4096, 4096, 32) != best


def test_tuning_tries_the_dense_product_with_many_rows(monkeypatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(launch, "linear", lambda x, weight, bias, plan: tried.append(plan))
    monkeypatch.setattr(ops, "dense", lambda x, weight, bias: tried.append(None))
    weights = tune.clones(tune.random_weight(128, 256, 4, 128, True, CPU), 2)
    for rows, dense in ((1, 0), (128, 1)):
        tried.clear()
        found = list(tune.tune(plan.Gpu("few", (9, 0), 2), weights, rows, torch.bfloat16))
        assert [plan for _, _, plan, _ in found].count(None) == dense
        assert len(tried) == 2 * len(found) == 2 * found[0][1]
        assert found[0][2] == plan.closed_form(plan.Gpu("few", (9, 0), 2), 4, 128, 128, 256, rows)


def test_what_is_timed_covers_the_cache_and_shares_nothing() -> None:
    weights = tune.clones(tune.random_weight(64, 256, 4, 32, False, CPU), 3)
    for name in ("qweight", "scale", "zero"):
        assert len({getattr(weight, name).data_ptr() for weight in weights}) == 3, name
    assert timing.copies(2 << 20, 60 << 20) == 120
    assert timing.copies(1 << 30, 60 << 20) == 2
    assert timing.copies(1 << 10, 60 << 20) == 200


def test_tuning_without_a_gpu_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "--shape", "64x128"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 1
    assert "No CUDA GPU here" in capsys.readouterr().err
