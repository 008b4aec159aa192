"""Packed linears: exact round trips."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmq import backends
from llmq.errors import BackendError, SchemeError
from llmq.nn import (
    PackedLinear,
    packed_modules,
    prepare,
)
from llmq.scheme import BITS, QuantScheme, grouped, minmax_grid, round_to_grid

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in (32, -1) for s in (True, False)]


def rtn(W, scheme):
    scale, zero = minmax_grid(grouped(W.detach().float(), scheme), scheme, W.dtype)
    return round_to_grid(W.detach(), scale, zero, scheme, W.dtype)


def linear(N=48, K=128, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias, dtype=dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packed_linear_is_the_dequantized_linear(scheme):
    dense = linear()
    q = rtn(dense.weight, scheme)
    layer = PackedLinear.from_quantized(q, dense.bias)
    back = layer.quantized()
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.zero, q.zero)
    assert torch.equal(back.scale, q.scale)
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x), F.linear(x, q.dequantize(), dense.bias))
    assert torch.equal(PackedLinear.from_linear(dense, scheme)(x), layer(x))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_loader_fills_a_meta_layer(scheme):
    source = PackedLinear.from_linear(linear(), scheme)
    target = PackedLinear(scheme, 128, 48, bias=True, dtype=torch.float32, device="meta")
    shapes = {name: (p.shape, p.dtype) for name, p in target.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in source.named_parameters()}
    assert not any(p.requires_grad for p in source.parameters())
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 128)
    assert torch.equal(target(x), source(x))
    assert source.weight_shape.tolist() == [48, 128]


def test_gradients_reach_the_input():
    layer = PackedLinear.from_linear(linear(), QuantScheme(4, 32))
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, -1))


def test_copies_and_casts_stay_prepared():
    layer = PackedLinear.from_linear(linear(dtype=torch.bfloat16), QuantScheme(4, 32))
    layer.prepare()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))
    cast = copy.deepcopy(layer).float()
    assert cast.backend == backends.choose(cast)
    assert torch.equal(cast(x.float()), F.linear(x.float(), cast.dequantize(), cast.bias))
    assert cast.to(torch.bfloat16).backend == backends.choose(layer)


def test_group_that_does_not_divide_is_named():
    with pytest.raises(SchemeError, match="in_features=100 is not divisible by group_size=64"):
        PackedLinear(QuantScheme(4, 64), 100, 48)


def test_prepare_covers_the_model_and_honours_a_name(caplog):
    model = nn.Sequential(
        PackedLinear.from_linear(linear(), QuantScheme(4, 32)),
        nn.ReLU(),
        PackedLinear.from_linear(linear(32, 48), QuantScheme(3, -1)),
    )
    assert prepare(model, "torch") is model
    assert [name for name, _ in packed_modules(model)] == ["0", "2"]
    assert not caplog.messages
    with pytest.raises(BackendError):
        prepare(model, "cpu-int4")  # float32
    prepare(model)
    (message,) = caplog.messages
    assert message.startswith("2 packed modules run on plain torch: ")
