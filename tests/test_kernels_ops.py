"""Packed layout, operators and launch choice: everything about the kernels that needs no Triton."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from llmq_kernels import layout, ops, plan, reference

H200 = plan.Gpu("NVIDIA H200 (a name without a table)", (9, 0), 132)


def packed(N: int, K: int, bits: int, group: int, symmetric: bool, seed: int = 0):
    """A random weight: (packed, float64 matrix)."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else K // group
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(N, groups, generator=generator) * 0.02 + 0.01).bfloat16()
    zero = torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8, generator=generator)
    weight = layout.pack(codes, scale, None if symmetric else zero, bits=bits, group_size=group)
    centred = codes.double().unflatten(1, (groups, -1))
    centred = centred - (2 ** (bits - 1) if symmetric else zero.double().unsqueeze(-1))
    return weight, (centred * scale.double().unsqueeze(-1)).flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(layout.BITS),
    N=st.integers(1, 140),
    K=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_codes_survive_packing(bits: int, N: int, K: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    words = layout.pack_codes(codes, bits)
    assert words.shape == (-(-N // 64), -(-K // 128), plan.block_words(bits))
    assert torch.equal(layout.unpack_codes(words, bits, N, K), codes)


def test_layout_as_drawn_in_the_readme() -> None:
    n, k = 37, 64 + 41  # 37 = 2*16 + 0*8 + 5; 41 = 2*16 + 1*8 + 0*2 + 1
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[n, k] = 9
    words = layout.pack_codes(codes, 4).view(2, 4, 8, 4, 4)  # block, m16, r, c, word
    expected = torch.zeros_like(words)
    expected[1, 2, 5, 0, 2] = 9 << (4 * (0 + 2 * 1) + 16 * 1)
    assert torch.equal(words, expected)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_is_the_definition(bits: int, symmetric: bool) -> None:
    weight, W = packed(70, 192, bits, 64, symmetric)
    x = torch.randn(5, 192, dtype=torch.float64)
    assert torch.equal(reference.dequantize(weight, torch.float64), W)
    torch.testing.assert_close(reference.linear(x, weight), x @ W.T)
    assert torch.equal(reference.dequantize(weight, torch.bfloat16), W.bfloat16())


def test_pack_refuses_what_the_layout_cannot_hold() -> None:
    codes, scale = torch.zeros(8, 96, dtype=torch.uint8), torch.ones(8, 2)
    with pytest.raises(ValueError, match="bits=5"):
        layout.pack(codes, scale, None, bits=5, group_size=32)
    with pytest.raises(ValueError, match="do not agree"):
        layout.pack(codes, scale, None, bits=4, group_size=64)


def test_joined_rows_are_the_rows_of_the_parts() -> None:
    parts = [packed(N, 128, 4, 64, False, seed=N) for N in (64, 128, 40)]
    joined = layout.join_rows([weight for weight, _ in parts])
    W = torch.cat([W for _, W in parts])
    assert torch.equal(reference.dequantize(joined, torch.float64), W)
    with pytest.raises(ValueError, match="can be joined"):
        layout.join_rows([parts[2][0], parts[0][0]])
    middle = ops.row_tiles(joined, 1, 2)
    assert torch.equal(reference.dequantize(middle, torch.float64), W[64:192])


# torch 2.14's check itself asks for the gradient of something that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_operators_pass_torchs_own_check(bias: bool, symmetric: bool) -> None:
    weight, _ = packed(70, 128, 4, 64, symmetric)
    x = torch.randn(3, 128, requires_grad=True)
    b = torch.randn(70, requires_grad=True) if bias else None
    torch.library.opcheck(
        torch.ops.llmq_kernels.linear.default,
        (x, weight.qweight, weight.scale, weight.zero, b, weight.counters, 4, 64, 70, False),
    )


def test_gradients_are_those_of_the_dense_layer() -> None:
    weight, W = packed(70, 128, 3, 32, False)
    x = torch.randn(2, 3, 128, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)
    y = ops.linear(x, weight, bias)
    expected = torch.nn.functional.linear(x, W, bias)
    seed = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    for ours, dense in zip(
        torch.autograd.grad(y, (x, bias), seed),
        torch.autograd.grad(expected, (x, bias), seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense)


def test_fullgraph_compile_forward_and_backward() -> None:
    weight, _ = packed(128, 64, 4, 32, False)

    def layer(x: Tensor) -> Tensor:
        return torch.relu(ops.linear(x, weight)) * 2

    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (compiled(x).sum() * 3).backward()
    assert x.grad is not None
    ours = x.grad.clone()
    x.grad.zero_()
    (layer(x).sum() * 3).backward()
    assert torch.equal(ours, x.grad)
    assert torch.equal(compiled(x), layer(x))


def test_stacked_experts_are_their_experts() -> None:
    stacked = [packed(70, 64, 4, 32, False, seed=e) for e in range(4)]
    weight = layout.stack([w for w, _ in stacked])
    x = torch.randn(5, 64, dtype=torch.float64)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1]])  # expert 2: nobody
    expected = torch.stack([x[t] @ stacked[e][1].T for t in range(5) for e in chosen[t].tolist()])
    torch.testing.assert_close(ops.linear_experts(x, weight, chosen), expected)


@pytest.mark.parametrize("block_m", [2, 16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_routing_lists_every_pair_once_beside_its_own_expert(block_m: int, tokens: int) -> None:
    from llmq_kernels import launch

    chosen = torch.randint(0, 6, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
    routing = launch.route(chosen, 8, block_m, 2)
    blocks = routing.pairs.view(-1, block_m).tolist()
    flat = chosen.flatten().tolist()
    seen = []
    for owner, block in zip(routing.experts.tolist(), blocks, strict=True):
        real = [p for p in block if p < routing.total]
        assert all(flat[p] == owner for p in real)
        assert (owner == -1) == (not real)
        seen += real
    assert sorted(seen) == list(range(len(flat)))


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
def test_closed_form_fits_the_gpu_and_ignores_the_batch(bits: int, group: int) -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu = plan.Gpu("unknown", capability, 132)
        for N, K in ((4096, 4096), (28672, 4096), (70, 256), (128256, 4096), (1024, 96 * 32)):
            small = [plan.closed_form(gpu, bits, group, N, K, M) for M in (1, 7, 16, 33, 64)]
            if capability == (9, 0):
                assert len({(p.split, p.unroll) for p in small}) == 1
            for p in [*small, plan.closed_form(gpu, bits, group, N, K, 512)]:
                assert 1 <= p.split <= 16
                assert -(-N // 64) % p.tiles == 0
                assert -(-K // 128) % p.unroll == 0


def test_many_rows_and_odd_widths_go_to_the_dense_product() -> None:
    assert plan.choose(H200, 4, 128, 4096, 4096, 2048) is None
    assert plan.choose(H200, 4, -1, 4096, 4099, 1) is None
    assert plan.choose(H200, 4, 128, 4096, 4096, 1) is not None
