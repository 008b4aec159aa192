"""The Triton backend's seat: what it refuses, and that its operators are the dense layer."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmq.backends import CPU_INT4, TORCH, TRITON, choose, why_plain
from llmq.errors import BackendError
from llmq.nn import PackedLinear
from llmq.scheme import QuantScheme
from llmq_kernels import ops, selfcheck

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layers() -> list[PackedLinear]:
    """Every format, from one small dense layer."""
    dense = nn.Linear(128, 70, dtype=torch.bfloat16)
    return [
        PackedLinear.from_linear(dense, QuantScheme(bits, group, symmetric))
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128, -1)
        for symmetric in (True, False)
    ]


def test_prepared_layers_compute_what_the_reference_computes(layers: list[PackedLinear]) -> None:
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    for layer in layers:
        layer.prepared = TRITON.prepare(layer)
        assert torch.equal(TRITON.matmul(x, layer), TORCH.matmul(x, layer)), layer.scheme


def on_gpu(**changes) -> Any:
    """What `why_not` looks at, of a layer on a GPU."""
    layer = {
        "weight_packed": SimpleNamespace(device=torch.device("cuda")),
        "weight_scale": torch.empty(1, dtype=torch.bfloat16),
        "scheme": QuantScheme(4, 128, False),
        "in_features": 256,
        "out_features": 64,
    }
    return SimpleNamespace(**(layer | changes))


def test_cpu_tensors_are_refused(layers: list[PackedLinear]) -> None:
    reason = TRITON.why_not(layers[0])
    assert reason is not None
    assert "on cpu" in reason
    with pytest.raises(BackendError, match="not on a CUDA GPU"):
        choose(layers[0], "triton")
    assert choose(layers[0]) is not TRITON


@pytest.mark.parametrize(
    ("capability", "changes", "expected"),
    [
        ((9, 0), {}, None),
        ((8, 0), {"scheme": QuantScheme(3, -1, True)}, None),
        ((7, 5), {}, "compute capability 7.5"),
        ((9, 0), {"scheme": SimpleNamespace(group_size=96)}, "group_size=96"),
        ((9, 0), {"weight_scale": torch.empty(1)}, "float32"),
    ],
)
def test_why_not_on_a_gpu(monkeypatch, capability, changes, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fine = dataclasses.replace(TRITON, check=lambda *format: None, min_triton=(3, 0))
    reason = fine.why_not(on_gpu(**changes))
    assert reason is None if expected is None else expected in reason


def test_an_old_triton_is_refused(monkeypatch) -> None:
    """torch 2.9 comes with triton 3.5."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = dataclasses.replace(TRITON, min_triton=(99, 1)).why_not(on_gpu())
    assert reason is not None
    assert "need 99.1 or newer" in reason


def test_kernels_that_fail_their_check_are_not_chosen(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked = []

    def check(*format):
        asked.append(format)
        return "the kernels compute wrongly here (3 rows)."

    broken = dataclasses.replace(TRITON, check=check, min_triton=(3, 0))
    among = (broken, CPU_INT4, TORCH)
    assert choose(on_gpu(), among=among) == TORCH
    assert why_plain(on_gpu(), among) == "the kernels compute wrongly here (3 rows)."
    with pytest.raises(BackendError, match="compute wrongly"):
        choose(on_gpu(), "triton", among)
    assert set(asked) == {(torch.device("cuda"), 4, 128, False, torch.bfloat16)}
    fine = dataclasses.replace(TRITON, check=lambda *format: None, min_triton=(3, 0))
    assert choose(on_gpu(), among=(fine, CPU_INT4, TORCH)) == fine


def test_the_check_runs_once_per_format() -> None:
    selfcheck.failure.cache_clear()
    for _ in range(3):
        assert selfcheck.failure(CPU, 4, 128, True, torch.bfloat16) is None
    assert selfcheck.failure.cache_info().misses == 1
    assert selfcheck.failure.cache_info().hits == 2


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"),
    [
        (bits, group, i % 2 == 0, (torch.bfloat16, torch.float16)[i // 2 % 2])
        for i, (bits, group) in enumerate(itertools.product((4, 8, 3, 2), (128, 64, 32, -1)))
    ],
)
def test_the_check_accepts_the_reference(bits, group, symmetric, dtype) -> None:
    assert selfcheck.examine(
        CPU, bits, group, symmetric, dtype, ops.linear, ops.linear_experts
    ) is None  # fmt: skip


def examined(linear=ops.linear, linear_experts=ops.linear_experts) -> str | None:
    return selfcheck.examine(CPU, 4, 128, False, torch.bfloat16, linear, linear_experts)


def wrong_in_one_row(x, weight, bias):
    y = ops.linear(x, weight, bias)
    y[-1, -1] += 3 * y.float().std().item()
    return y


def never_written(x, weight, bias):
    y = ops.linear(x, weight, bias)
    y[0, 0] = float("nan")
    return y


def without_zero_points(x, weight, bias):
    return ops.linear(x, dataclasses.replace(weight, zero=None), bias)


def wrong_only_with_many_rows(x, weight, bias):
    y = ops.linear(x, weight, bias)
    return y if len(x) < 512 else 1.01 * y


@pytest.mark.parametrize(
    "linear", [wrong_in_one_row, never_written, without_zero_points, wrong_only_with_many_rows]
)
def test_the_check_sees_wrong_numbers(linear) -> None:
    assert "compute wrongly here" in (examined(linear) or "")


def test_the_check_sees_results_that_change_and_wrong_experts() -> None:
    calls = itertools.count()

    def counter_not_reset(x, weight, bias):
        y = ops.linear(x, weight, bias)
        y[0, 0] += 2.0**-7 * y[0, 0].abs() * (next(calls) % 2)
        return y

    assert "other bits on a second run (1 rows)" in (examined(counter_not_reset) or "")
    swapped = lambda x, w, chosen: ops.linear_experts(x, w, chosen.flip(1))  # noqa: E731
    assert "stacked experts" in (examined(linear_experts=swapped) or "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        subprocess.CalledProcessError(1, ["gcc"]),
        FileNotFoundError("ptxas"),
        ImportError("libcuda.so.1: cannot open shared object file"),
        "PTXASError",
        "OutOfResources",
    ],
    ids=lambda error: str(error).partition(":")[0],
)
def test_kernels_that_cannot_run_give_a_sentence(error) -> None:
    runtime = pytest.importorskip("triton.runtime.errors")
    if error == "PTXASError":
        error = runtime.PTXASError("unsupported .version")
    elif error == "OutOfResources":
        error = runtime.OutOfResources(300, 227, "shared memory")

    def fails(*arguments):
        raise error

    reason = examined(fails) or ""
    assert reason.startswith(f"the kernels do not run here ({type(error).__name__}")
    assert "\n" not in reason


def test_out_of_memory_and_mistakes_of_ours_are_not_hidden() -> None:
    for error in (torch.OutOfMemoryError("no room"), TypeError("a mistake")):

        def fails(*arguments, error=error):
            raise error

        with pytest.raises(type(error)):
            examined(fails)
