"""Packed modules: exact round trips, and experts against transformers' own module."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import tiny_ids, tiny_model

from llmq import backends, fuse
from llmq.errors import BackendError, SchemeError
from llmq.nn import (
    STACKS,
    PackedExperts,
    PackedLinear,
    expert_bias,
    expert_weight,
    is_stacked_experts,
    packed_modules,
    prepare,
)
from llmq.scheme import BITS, QuantScheme, grouped, minmax_grid, round_to_grid

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in (32, -1) for s in (True, False)]
MOE = ("mixtral", "qwen3_moe", "gpt_oss")


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


def experts_of(name, dtype=torch.float32):
    model = tiny_model(name, dtype)
    path, experts = next((n, m) for n, m in model.named_modules() if is_stacked_experts(m))
    return model, path, experts


def quantize_experts(experts, scheme):
    stacks = [
        [rtn(expert_weight(experts, stack, e), scheme) for e in range(experts.num_experts)]
        for stack in STACKS
    ]
    packed = PackedExperts.from_quantized(experts, *stacks)
    dense = copy.deepcopy(experts)
    with torch.no_grad():
        for stack, results in zip(STACKS, stacks, strict=True):
            for e, q in enumerate(results):
                expert_weight(dense, stack, e).copy_(q.dequantize())
    return packed, dense


def routing(experts, tokens=11, top_k=2):
    torch.manual_seed(1)
    H = expert_weight(experts, "down_proj", 0).shape[0]
    scores = torch.randn(tokens, experts.num_experts - 1)  # the last expert is never chosen
    weights, chosen = scores.softmax(-1).topk(top_k)
    return torch.randn(tokens, H), chosen, weights


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32, False), QuantScheme(3, 64, True)], ids=str)
@pytest.mark.parametrize("name", MOE)
def test_packed_experts_equal_the_stock_module(name, scheme):
    _, _, experts = experts_of(name)
    packed, dense = quantize_experts(experts, scheme)
    x, chosen, weights = routing(experts)
    got, truth = packed(x, chosen, weights), dense(x, chosen, weights)
    assert torch.allclose(got, truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
    packed.prepare()
    assert torch.equal(packed(x, chosen, weights), got)
    assert torch.equal(copy.deepcopy(packed)(x, chosen, weights), got)
    assert not any(p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32, False), QuantScheme(3, 64, True)], ids=str)
@pytest.mark.parametrize("name", MOE)
def test_experts_multiplied_together_equal_experts_one_by_one(name, scheme):
    """The path of the Triton kernels, whose operators compute their reference on a CPU."""
    _, _, experts = experts_of(name)
    packed, _ = quantize_experts(experts, scheme)
    x, chosen, weights = routing(experts)
    one_by_one = packed(x, chosen, weights)
    packed.stack_experts([packed.expert(e) for e in range(packed.num_experts)])
    together = packed(x, chosen, weights)
    assert (together - one_by_one).norm() <= 1e-6 * one_by_one.norm()
    assert packed(x[:0], chosen[:0], weights[:0]).shape == (0, x.shape[1])
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")  # nothing waits for rows
    assert torch.equal(compiled(x, chosen, weights), together)
    packed.to(torch.float32)  # chooses again: no GPU here
    assert torch.equal(packed(x, chosen, weights), one_by_one)


def test_why_experts_are_not_multiplied_together():
    triton = dataclasses.replace(backends.TRITON, check=lambda *format: None)
    layer = PackedLinear(QuantScheme(4, -1), 20, 64, device="meta")
    assert triton.why_not_stacked(layer) == "in_features=20 is not divisible by 8."
    layer = PackedLinear(QuantScheme(4, -1), 24, 64, device="meta")
    assert "not on a CUDA GPU" in (triton.why_not_stacked(layer) or "")


@pytest.mark.parametrize("name", MOE)
def test_a_loader_fills_meta_experts(name):
    _, _, experts = experts_of(name)
    scheme = QuantScheme(4, 32, False)
    source, _ = quantize_experts(experts, scheme)
    target = PackedExperts(experts, scheme, scheme)
    shapes = {n: (p.shape, p.dtype) for n, p in target.named_parameters()}
    assert shapes == {n: (p.shape, p.dtype) for n, p in source.named_parameters()}
    target.load_state_dict(source.state_dict(), assign=True)
    inputs = routing(experts)
    assert torch.equal(target(*inputs), source(*inputs))
    assert experts.gate_up_proj.ndim == 3  # the source module is left as it was


def test_expert_layers_carry_weight_and_bias():
    _, _, experts = experts_of("gpt_oss")
    scheme = QuantScheme(8, 32, True)
    packed, dense = quantize_experts(experts, scheme)
    for stack, layer in zip(STACKS, packed.expert(2), strict=True):
        assert torch.equal(layer.dequantize(), expert_weight(dense, stack, 2))
        bias = expert_bias(experts, stack, 2)
        assert layer.bias is not None
        assert bias is not None
        assert torch.equal(layer.bias, bias)


def test_experts_of_one_stack_share_a_scheme():
    _, _, experts = experts_of("mixtral")
    q = [[rtn(expert_weight(experts, s, e), QuantScheme(4, 32)) for e in range(4)] for s in STACKS]
    q[1][3] = rtn(expert_weight(experts, "down_proj", 3), QuantScheme(8, 32))
    with pytest.raises(SchemeError, match="down_proj"):
        PackedExperts.from_quantized(experts, *q)


def test_rows_that_do_not_fill_words_keep_their_width():
    class Stacked(nn.Module):
        num_experts, is_transposed, has_bias = 2, False, False

        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 40, 80))
            self.down_proj = nn.Parameter(torch.randn(2, 80, 20))

        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, -1)[0]

    experts = Stacked()
    assert is_stacked_experts(experts)
    packed, dense = quantize_experts(experts, QuantScheme(3, -1))
    for stack, layer in zip(STACKS, packed.expert(1), strict=True):
        assert torch.equal(layer.dequantize(), expert_weight(dense, stack, 1))


def test_dense_models_have_no_stacked_experts():
    assert not any(is_stacked_experts(m) for m in tiny_model("llama").modules())


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
