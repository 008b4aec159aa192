"""The Triton backend's seat: what it refuses, and that its operators are the dense layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmq.backends import TORCH, TRITON, choose
from llmq.errors import BackendError
from llmq.nn import PackedLinear
from llmq.scheme import QuantScheme


@pytest.fixture(scope="module")
def layers() -> list[PackedLinear]:
    """Every format, from one small dense layer."""
    torch.manual_seed(0)
    dense = nn.Linear(128, 70, dtype=torch.bfloat16)
    return [
        PackedLinear.from_linear(dense, QuantScheme(bits, group, symmetric))
        for bits in (2, 3, 4, 8)
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
    reason = TRITON.why_not(on_gpu(**changes))
    assert reason is None if expected is None else expected in reason
