"""Packed experts against transformers' own module."""

import copy
import dataclasses
import itertools

import pytest
import torch
from test_nn import rtn
from torch import nn
from zoo import tiny_model

from llmq import backends
from llmq.errors import SchemeError
from llmq.nn import (
    STACKS,
    PackedExperts,
    PackedLinear,
    expert_bias,
    expert_weight,
    is_stacked_experts,
)
from llmq.scheme import QuantScheme

MOE = ("mixtral", "qwen3_moe", "gpt_oss")
SCHEMES = (QuantScheme(4, 32, False), QuantScheme(3, 64, True))


def experts_of(name):
    return next(m for m in tiny_model(name).modules() if is_stacked_experts(m))


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


def routing(experts):
    torch.manual_seed(1)
    H = expert_weight(experts, "down_proj", 0).shape[0]
    scores = torch.randn(11, experts.num_experts - 1)  # the last expert is never chosen
    weights, chosen = scores.softmax(-1).topk(2)
    return torch.randn(11, H), chosen, weights


@pytest.fixture(params=itertools.product(MOE, SCHEMES), ids=lambda of: f"{of[0]}-{of[1]}")
def case(request):
    """Packed, dequantized, and what either is called with."""
    name, scheme = request.param
    experts = experts_of(name)
    return *quantize_experts(experts, scheme), routing(experts)


def test_packed_experts_equal_the_stock_module(case):
    packed, dense, inputs = case
    got, truth = packed(*inputs), dense(*inputs)
    assert torch.allclose(got, truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
    packed.prepare()
    assert torch.equal(packed(*inputs), got)
    assert torch.equal(copy.deepcopy(packed)(*inputs), got)
    assert not any(p.requires_grad for p in packed.parameters())


def test_experts_multiplied_together_equal_experts_one_by_one(case):
    """The path of the Triton kernels, whose operators compute their reference on a CPU."""
    packed, _, (x, chosen, weights) = case
    one_by_one = packed(x, chosen, weights)
    packed.stack_experts([packed.expert(e) for e in range(packed.num_experts)])
    together = packed(x, chosen, weights)
    assert (together - one_by_one).norm() <= 1e-6 * one_by_one.norm()
    assert packed(x[:0], chosen[:0], weights[:0]).shape == (0, x.shape[1])
    torch.compiler.reset()  # what other cases have compiled counts towards a limit
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
    experts = experts_of(name)
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
    experts = experts_of("gpt_oss")
    scheme = QuantScheme(8, 32, True)
    packed, dense = quantize_experts(experts, scheme)
    for stack, layer in zip(STACKS, packed.expert(2), strict=True):
        assert torch.equal(layer.dequantize(), expert_weight(dense, stack, 2))
        bias = expert_bias(experts, stack, 2)
        assert layer.bias is not None
        assert bias is not None
        assert torch.equal(layer.bias, bias)


def test_experts_of_one_stack_share_a_scheme():
    experts = experts_of("mixtral")
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
