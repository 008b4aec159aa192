"""Weights that a backend holds in its own layout: in memory once, and in the file as they were.

Triton's backend stands in for a GPU: its operators compute by the reference on a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from llmq import backends, fuse, hf
from llmq.nn import PackedLinear, packed_modules, prepare
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN


@dataclass(frozen=True)
class Anywhere(backends.Triton):
    """The backend without its refusals."""

    def why_not(self, layer: backends.Layer) -> str | None:
        return None


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """`prepare` chooses Triton's backend."""
    monkeypatch.setattr(backends, "TRITON", Anywhere())
    monkeypatch.setattr(backends, "choose", lambda layer, *_: backends.TRITON)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_is_rebuilt_bit_for_bit(on_gpu, bits: int, group: int, symmetric: bool) -> None:
    dense = nn.Linear(384 if group == 128 else 320, 70, dtype=torch.bfloat16)
    layer = PackedLinear.from_linear(dense, QuantScheme(bits, group, symmetric))
    before, value = tensors(layer), layer.quantized()
    x = torch.randn(3, dense.in_features, dtype=torch.bfloat16)
    y = layer(x)
    layer.prepare()
    assert layer.released
    assert layer.weight_packed.untyped_storage().nbytes() == 4
    assert layer.weight_packed.shape == before["weight_packed"].shape
    torch.testing.assert_close(layer(x), y)
    assert same(tensors(layer), before)
    again = layer.quantized()
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(again, name), getattr(value, name)), name
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(backends.dequantize(layer, dtype), value.dequantize(dtype))
    layer.restore()
    assert not layer.released
    assert same({n: p.detach() for n, p in layer.named_parameters()}, before)


def test_gradients_casts_copies_and_loading(on_gpu) -> None:
    dense = nn.Linear(128, 64, dtype=torch.bfloat16)
    layer = PackedLinear.from_linear(dense, QuantScheme(4, 32, False))
    W, before = layer.dequantize(torch.float32), tensors(layer)
    layer.prepare()
    x = torch.randn(2, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, W.sum(0).expand(2, -1))
    assert same(tensors(copy.deepcopy(layer)), before)
    layer.to(torch.float16)
    assert layer.released
    assert layer.weight_scale.dtype == torch.float16
    other = PackedLinear.from_linear(
        nn.Linear(128, 64, dtype=torch.bfloat16), QuantScheme(4, 32, False)
    )
    layer.to(torch.bfloat16)
    layer.load_state_dict(other.state_dict())
    assert layer.released
    assert torch.equal(layer.dequantize(), other.dequantize())
    torch.testing.assert_close(layer(x.bfloat16()), other(x.bfloat16()))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_model_is_held_once_and_saved_as_it_was(on_gpu, tmp_path, name: str) -> None:
    model: Any = zoo.tiny_model(name, torch.bfloat16)
    list(quantize(model, [zoo.tiny_ids()], Recipe(QuantScheme(4, 32, False), RTN())))
    plain = hf.save(model, tmp_path / "plain")
    before = tensors(model)
    ids = zoo.tiny_ids(2, 7)
    with torch.no_grad():
        y = model(ids).logits
        prepare(model)
        assert all(module.released for _, module in packed_modules(model))
        for _, module in packed_modules(model):
            own = [p for n, p in module.named_parameters() if n.endswith(("_packed", "_scale"))]
            assert own
            assert all(p.untyped_storage().nbytes() <= 4 for p in own)
        after = model(ids).logits
        assert (after - y).norm() <= 2e-2 * y.norm()
        assert same(tensors(model), before)
        assert fuse.fuse_on_gpu(model) > 0
        fused = model(ids).logits
    assert (fused - y).norm() <= 2e-2 * y.norm()
    assert same(tensors(model), before)
    again = hf.save(model, tmp_path / "again")
    files = sorted(path.name for path in plain.glob("*.safetensors"))
    assert files
    for file in files:
        assert (plain / file).read_bytes() == (again / file).read_bytes()
