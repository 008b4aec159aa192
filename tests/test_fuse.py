"""Layers that read one tensor, fused, and heads that are rounded at load."""

from typing import Any

import pytest
import torch
from test_nn import linear
from torch import nn
from zoo import tiny_ids, tiny_model

from llmq import backends, fuse
from llmq.nn import PackedLinear, packed_modules, prepare
from llmq.scheme import QuantScheme


def pack_linears(model, scheme):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, PackedLinear.from_linear(module, scheme))
    return prepare(model)


@pytest.mark.parametrize(
    ("name", "scheme", "groups"),
    [
        ("llama", QuantScheme(4, 32, False), 4),  # two blocks of q, k, v and gate, up
        ("qwen2", QuantScheme(4, 64, True), 4),  # biases
        ("opt", QuantScheme(3, 64, True), 2),
        ("phi3", QuantScheme(4, 64, True), 0),  # fused by its makers
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fusing_changes_neither_results_nor_parameters(name, scheme, groups, dtype):
    model = pack_linears(tiny_model(name, dtype), scheme)
    few, many = tiny_ids(1, 5), tiny_ids(2, 24)
    with torch.no_grad():
        before = [model(ids).logits for ids in (few, many)]
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        assert fuse.fuse_shared_inputs(model, input_ids=few) == groups
        after = [model(ids).logits for ids in (few, many)]
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        for a, b in zip(before, after, strict=True):
            assert (a - b).norm() <= tolerance * a.norm()
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[k], v) for k, v in saved.items())
        model.to(torch.float32)  # undoes the fusion
        assert not any("fused" in str(module) for _, module in packed_modules(model))


@pytest.mark.parametrize(("name", "groups"), [("llama", 4), ("mixtral", 2), ("phi3", 0)])
def test_layers_of_the_triton_kernels_are_fused(name, groups):
    model: Any = pack_linears(tiny_model(name, torch.bfloat16), QuantScheme(4, 32, False))
    ids = tiny_ids(1, 5)
    assert fuse.fuse_on_gpu(model) == 0  # none runs on them here
    for _, layer in packed_modules(model):
        if isinstance(layer, PackedLinear):  # their operators run everywhere
            layer.backend, layer.prepared = backends.TRITON, backends.TRITON.prepare(layer)
    with torch.no_grad():
        before = model(ids).logits
        assert fuse.fuse_on_gpu(model) == groups
        after = model(ids).logits
    assert (before - after).norm() <= 2e-2 * before.norm()
    fused = [m for _, m in packed_modules(model) if "fused" in str(m)]
    assert len(fused) == {"llama": 10, "mixtral": 6, "phi3": 0}[name]
    assert not any(m.prepared for m in fused)  # the repacked weight is held once


def test_offloaded_layers_are_left_alone():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (PackedLinear.from_linear(linear(), QuantScheme(4, 32)) for _ in "ab")
            self.b.weight_packed = nn.Parameter(self.b.weight_packed.to("meta"), False)
            self.a.weight_packed = nn.Parameter(self.a.weight_packed.to("meta"), False)

        def forward(self, x):
            for hook in self.a._forward_pre_hooks.values():
                hook(self.a, (x,))
            for hook in self.b._forward_pre_hooks.values():
                hook(self.b, (x,))

    assert fuse.fuse_shared_inputs(Pair(), torch.randn(3, 128)) == 0


def test_a_fused_layer_called_alone_is_still_right():
    a, b = (PackedLinear.from_linear(linear(), QuantScheme(4, 32)) for _ in range(2))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x):
            return self.a(x) + self.b(x)

    pair = Pair()
    x, y = torch.randn(3, 128), torch.randn(3, 128)
    expected = a(x), b(y), a(y)
    assert fuse.fuse_shared_inputs(pair, x) == 1
    for layer, argument, truth in zip((a, b, a), (x, y, y), expected, strict=True):
        assert torch.allclose(layer(argument), truth, atol=1e-5)


def test_quantized_head_of_a_tied_model_leaves_the_embedding():
    model: Any = tiny_model("qwen3", torch.bfloat16)
    ids = tiny_ids(1, 5)
    with torch.no_grad():
        before = model(ids).logits.float()
        embedding = model.get_input_embeddings().weight.clone()
        fuse.pack_head(model)
        after = model(ids).logits.float()
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert 0 < (before - after).norm() <= 0.02 * before.norm()


@pytest.mark.parametrize(
    ("width", "bits", "group"),
    [(256, 8, 128), (192, 8, 64), (80, 8, -1), (256, 4, 32), (40, 4, -1)],
)
def test_scheme_of_the_head(width, bits, group):
    assert fuse.head_scheme(width, bits) == QuantScheme(bits, group, True)
