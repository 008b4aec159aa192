"""Matrices of mixtures as linears, and the dtypes in which models run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from test_journal import OPTIONS, TEXT
from torch import nn
from zoo import save_tiny

from llmq import adapters, api, measure
from llmq.adapters import RoutedLinear, run_dtype, running, widened
from llmq.nn import PackedLinear
from llmq.scheme import QuantScheme


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=5))
def test_padding_changes_no_row(counts):
    generator = torch.Generator().manual_seed(sum(counts))
    weight = torch.randn(len(counts), 6, 8, generator=generator)
    bias = torch.randn(len(counts), 6, generator=generator)
    rows = [torch.randn(t, 8, generator=generator) for t in counts]
    found = RoutedLinear(weight, bias)(rows)
    for x, W, b, y in zip(rows, weight.double(), bias.double(), found, strict=True):
        assert y.shape == (len(x), 6)
        torch.testing.assert_close(y.double(), x.double() @ W.T + b, rtol=1e-5, atol=1e-5)


def test_few_shapes_reach_the_product(monkeypatch):
    """oneDNN keeps a kernel for each of them."""
    seen = set()
    product = torch.nn.functional.linear

    def watched(x, W, b):
        seen.add(len(x))
        return product(x, W, b)

    monkeypatch.setattr("llmq.adapters.F.linear", watched)
    linear = RoutedLinear(torch.ones(1, 2, 3), None)
    for t in range(2049):
        assert linear([torch.ones(t, 3)])[0].shape == (t, 2)
    assert len(seen) <= 4 * 11 + 1
    assert max(seen) == 2048


@pytest.mark.parametrize("there", [True, False])
def test_halves_run_in_what_the_cpu_multiplies(monkeypatch, there):
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: there)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float16, torch.bfloat16):
        assert run_dtype(dtype, cpu) == (torch.bfloat16 if there else torch.float32)
        assert run_dtype(dtype, gpu) == dtype
    assert run_dtype(torch.float32, cpu) == torch.float32


def test_where_halves_are_slow_dense_weights_get_wider_and_packed_ones_stay(monkeypatch):
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: False)
    linear = nn.Linear(64, 32).bfloat16()
    packed = PackedLinear.from_linear(linear, QuantScheme(4, 32))
    model = nn.Sequential(nn.Linear(64, 64).half(), packed, nn.LayerNorm(32))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with running(model, torch.device("cpu")):
        inside = model.state_dict()
        assert inside["0.weight"].dtype == torch.float32
        assert inside["1.weight_scale"].dtype == torch.bfloat16
        assert all(
            torch.equal(inside[key], tensor.to(inside[key].dtype)) for key, tensor in before.items()
        )
        assert model(torch.randn(3, 64)).dtype == torch.float32
    assert all(tensor.dtype == before[key].dtype for key, tensor in model.state_dict().items())
    assert widened(model).get_parameter("0.weight").dtype == torch.float32
    assert packed.weight_scale.dtype == torch.bfloat16
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: True)
    assert widened(nn.Linear(4, 4).half()).weight.dtype == torch.float16


@pytest.mark.parametrize("there", [True, False])
def test_checkpoints_keep_their_dtype(monkeypatch, tmp_path, there):
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: there)
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    report = api.quantize(source, tmp_path / "out", calibration=TEXT, **OPTIONS)
    assert report["judged"]["kl"] is not None
    stored = load_file(tmp_path / "out" / "model.safetensors")
    floating = {t.dtype for t in stored.values() if t.is_floating_point()}
    assert floating == {torch.bfloat16}
    found = measure.evaluate(tmp_path / "out", TEXT, reference=source, seq_len=64, windows=2)
    assert found.kl is not None
    assert found.kl < 1
